"""Read by transformers under trust_remote_code=True: this model needs the package ema-timm."""

try:
    import ema_timm  # registers the networks with timm
except ImportError as error:
    raise ImportError(
        "This model has EMA attention (Efficient Multi-scale Attention) layers, which timm finds "
        "in the package ema-timm. Install it with: pip install ema-timm"
    ) from error

from transformers import TimmWrapperConfig


class EmaTimmConfig:
    """Hands over to transformers' own timm wrapper, which knows the network by now."""

    needs = f"ema-timm, found {ema_timm.__version__}"

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Called by transformers; there is no class of our own to save with a model."""

    @classmethod
    def from_pretrained(cls, name, **kwargs):
        """The configuration of the model at ``name``."""
        return TimmWrapperConfig.from_pretrained(name, **kwargs)
