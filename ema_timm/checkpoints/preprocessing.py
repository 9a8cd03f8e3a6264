"""How a network's images are prepared: timm's rule, as every measurement and config.json has it."""

from timm.data import resolve_data_config
from torch import nn

PREPROCESSING = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
"""What `preprocessing` says that config.json and results.json keep."""


def preprocessing(
    model: nn.Module, model_args: dict, told: dict, use_test_size: bool = False
) -> dict:
    """How a network's images are prepared for evaluation.

    Args:
        model: The network; its pretrained cfg says what is not told.
        model_args: Arguments that rebuild it.
        told: Settings by timm's names: ``img_size``, ``crop_pct``, ``interpolation``, ….
        use_test_size: Take the sizes that timm recommends for testing, where there are some.
    """
    channels = model_args.get("in_chans", model.pretrained_cfg["input_size"][0])
    told = {**told, "in_chans": channels}
    data = resolve_data_config(told, model=model, use_test_size=use_test_size)
    data["input_size"] = (channels, *data["input_size"][1:])
    for key in ("mean", "std"):
        if len(data[key]) != channels:  # statistics of RGB, and a network for greyscale, say
            data[key] = (sum(data[key]) / len(data[key]),) * channels
    return data
