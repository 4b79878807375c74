"""Text encoders of the transformers library, through open_clip's adapter."""

from typing import Any, Literal

from torch import Tensor

from vlm.config import Config
from vlm.errors import ConfigError

__all__ = ["HuggingFaceTower"]

_POOLERS = {
    "cls": "cls_last_hidden_state_pooler",
    "cls_pooler": "cls_pooler",
    "mean": "mean_pooler",
}


class HuggingFaceTower(Config):
    """A text encoder of transformers, as BERT; needs the extra `huggingface`.

    Of the kinds that open_clip opens too: bert, roberta, xlm-roberta, mt5 and m2m_100. It needs
    the tokenizer it was made with, `tokenizer: {type: huggingface, source: …}`.
    """

    type: Literal["huggingface"] = "huggingface"
    name: str
    """A folder with `config.json` and weights, or a name on the model hub."""
    pretrained: bool = True
    """Start from its weights; else only its architecture is taken."""
    pooling: Literal["cls", "cls_pooler", "mean"] = "cls"
    """What stands for the text: the first position's last state, BERT's tanh layer on it, or the
    mean over all that is not padding."""
    projection: Literal["linear", "mlp"] = "linear"
    """From there to the shared space, without a bias."""

    @property
    def quick_gelu(self) -> bool | None:
        return None

    def open_clip_config(self) -> dict[str, Any]:
        return {
            "hf_model_name": self.name,
            "hf_tokenizer_name": self.name,
            "hf_model_pretrained": False,
            "hf_pooler_type": _POOLERS[self.pooling],
            "hf_proj_type": self.projection,
        }

    def initial_weights(self) -> dict[str, Tensor] | None:
        """Without the projection, which is fresh."""
        if not self.pretrained:
            return None
        from transformers import AutoModel  # noqa: PLC0415 - an optional extra
        from transformers.utils import logging  # noqa: PLC0415 - an optional extra

        # It would draw a bar and list each tensor of heads that nobody asked for.
        logging.disable_progress_bar()  # type: ignore[no-untyped-call] # transformers has few types
        logging.set_verbosity_error()  # type: ignore[no-untyped-call] # transformers has few types
        options = {} if _is_t5(self.name) else {"add_pooling_layer": self.pooling == "cls_pooler"}
        try:
            model = AutoModel.from_pretrained(self.name, trust_remote_code=False, **options)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0][:200]
            message = f"model.text.name={self.name}: no weights can be read ({reason})"
            raise ConfigError(message) from error
        if getattr(model.config, "is_encoder_decoder", False):
            model = model.encoder
        return {f"transformer.{name}": tensor for name, tensor in model.state_dict().items()}


def _is_t5(name: str) -> bool:
    from transformers import AutoConfig  # noqa: PLC0415 - an optional extra

    return bool(getattr(AutoConfig.from_pretrained(name), "is_encoder_decoder", False))
