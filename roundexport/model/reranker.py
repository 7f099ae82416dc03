"""Rerankers made of a decoder (Qwen3-Reranker): the likelihood of "yes" against "no" behind a query and a document.

    modules.json     sentence-transformers' cross-encoder: Transformer, LogitScore
    LogitScore       true_token_id, and false_token_id or null

    score = logits[last, true] - logits[last, false]        whose sigmoid is p(true) of the two

A loaded model is made to give that number as its logits, [B, 1]: lm_head is asked for the last token that is not
padding alone, and whatever the model does to logits behind it is done.  All that knows heads then knows this one.  The
texts are put into the chat template, as messages of the roles query and document, by the package's runtime.

Source: `sentence_transformers.cross_encoder.modules.LogitScore` of release 6.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roundexport.errors import ArtifactError, CheckpointError
from roundexport.formats.embedding_head import modules_of
from roundexport.storage.paths import ListedFiles
from roundexport.storage.strict_json import parse

_KIND = "LogitScore"


@dataclass(frozen=True)
class LogitScore:
    """Tokens whose logits are compared.

    Args:
        true: of a document that matters.
        false: of one that does not; None: the logit of ``true`` alone is the score.
    """

    true: int
    false: int | None


def logit_score(folder: Path) -> LogitScore | None:
    """The tokens of a folder that is such a reranker; None of any other.

    Raises:
        CheckpointError: its files are damaged.
    """
    files = ListedFiles(folder)
    try:
        places = [one["path"] for one in modules_of(files) if one["type"].rsplit(".", 1)[-1] == _KIND]
        if not places:
            return None
        path = files.path(f"{places[0]}/config.json")
        found = parse(path.read_bytes(), str(path))
    except (ArtifactError, OSError) as error:
        raise CheckpointError(str(error)) from error
    true, false = found.get("true_token_id"), found.get("false_token_id")
    if not isinstance(true, int) or not isinstance(false, int | None):
        raise CheckpointError(f"{path}: true_token_id must be a token's id, false_token_id one or null")
    return LogitScore(true, false)


def as_reranker(model: Any, score: LogitScore) -> None:
    """Make a causal language model give scores [B, 1] of whole rows as its logits, in place.

    Args:
        model: the transformers model.
        score: what is compared.
    """
    from transformers.modeling_outputs import SequenceClassifierOutput

    inner = model.forward

    def forward(input_ids: Any, attention_mask: Any = None, **_: Any) -> SequenceClassifierOutput:
        def last(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = given[0]
            if attention_mask is None:
                return (hidden[:, -1:],)
            places = attention_mask.cumsum(-1) * attention_mask
            at = (places == attention_mask.sum(-1, keepdim=True)) & (attention_mask == 1)
            return ((hidden * at[:, :, None].to(hidden.dtype)).sum(1, keepdim=True),)

        handle = model.get_output_embeddings().register_forward_pre_hook(last)
        try:
            logits = inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, 0]
        finally:
            handle.remove()
        found = logits[:, score.true]
        return SequenceClassifierOutput(
            logits=(found if score.false is None else found - logits[:, score.false])[:, None]
        )

    model.forward = forward
