"""The decoder of a vision-language model whose transformers library has no class for the decoder with its head.

    logits = lm_head(decoder(input_ids, …))

Qwen2-VL, Qwen2.5-VL, Qwen3-VL and GLM-4V are so: a text model without a head, and a head on the class that also takes
images.  Where transformers has a class of its own (Gemma 3, Mistral 3, Llama 4), that one is used.

Limits: a config that says how logits are scaled or capped is refused, as the formula above does neither.
Source: forward of the `…ForConditionalGeneration` classes of transformers 5.23; held against them in
tests/model/test_text_part.py.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import MODEL_MAPPING, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from roundexport.errors import UnsupportedError

from .cache_argument import cache_argument

_CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "logits_multiplier")


class LanguageModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A text model of transformers under a head.

    Args:
        config: its text config.

    Raises:
        UnsupportedError: the config changes logits behind the head.
    """

    base_model_prefix = "model"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if changed := [key for key in _CHANGES_LOGITS if getattr(config, key, None)]:
            raise UnsupportedError(f"{type(config).__name__}: {changed[0]} changes logits in a way that is not known")
        self.model = MODEL_MAPPING[type(config)](config)  # the library's own class, never a folder's code
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        (self._cache,) = cache_argument(self.model, None)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, use_cache: bool | None = None, **inputs: Any
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V]; ``inputs`` are those of the text model."""
        if "past_key_values" in inputs:
            inputs[self._cache] = inputs.pop("past_key_values")
        out = self.model(input_ids=input_ids, use_cache=use_cache, **inputs)
        return CausalLMOutputWithPast(
            logits=self.lm_head(out.last_hidden_state), past_key_values=getattr(out, "past_key_values", None)
        )
