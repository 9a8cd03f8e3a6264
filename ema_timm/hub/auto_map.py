"""The ``auto_map`` of config.json: tells a reader without the plug-in what to install.

transformers loads a timm folder by itself. Where it does not know the architecture, it advises to
upgrade timm, which does not help. With ``trust_remote_code=True`` it imports the module that
``auto_map`` names, and that one names the remedy.
"""

from importlib import resources

STUB = "configuration_ema_timm.py"
"""The module beside config.json that ``auto_map`` names."""

AUTO_MAP = {"AutoConfig": "configuration_ema_timm.EmaTimmConfig"}


def needs_auto_map(architecture: str) -> bool:
    """Whether timm alone does not know ``architecture``."""
    return architecture.endswith("_ema") or architecture.startswith("cifar_resnet")


def stub_text() -> str:
    """The content of the stub."""
    return resources.files(__package__).joinpath("stub", STUB).read_text("utf-8")


def completed(config: dict) -> dict:
    """``config`` as both timm and transformers load it, with ``auto_map`` where it is needed.

    timm 1.0.31 writes ``num_classes`` among the network's arguments as well as at the top level,
    and transformers then passes it twice; at the top level alone it satisfies both.
    """
    config = dict(config)
    args = {k: v for k, v in config.pop("model_args", {}).items() if k != "num_classes"}
    if args:
        config["model_args"] = args
    if needs_auto_map(config["architecture"]):
        config["auto_map"] = AUTO_MAP
    return config
