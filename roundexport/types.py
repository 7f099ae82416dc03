"""Words that models, files and graphs share; they belong to none of them."""

from __future__ import annotations

from typing import Literal, TypedDict

Task = Literal[
    "generate",
    "embed",
    "classify",
    "tag",
    "fill",
    "answer",
    "embed_image",
    "classify_image",
    "rerank",
    "translate",
    "transcribe",
    "ctc",
]
"""What a model is for, by what comes out of it for token ids [B, S]:

    generate   logits [B, S, V] of the next token, with a KV cache        embed   hidden states [B, S, H]
    classify   logits [B, labels] of the text, or of a pair of texts      tag     logits [B, S, labels] of every token
    rerank     logits [B, 1] of a query with a document, by a decoder's word for one token against another
    fill       logits [B, S, V] of the token that stands there
    answer     logits [B, S, 2] of a question with a text: that the answer begins there, and that it ends there

and for pixels [B, C, height, width]:

    embed_image   hidden states [B, S, H] of the patches, and the model's own vector [B, D] where it makes one
    classify_image   logits [B, labels] of the image

for samples of a sound [B, T]:

    ctc   logits [B, frames, V] of what is being said, with one word of V for "nothing new" (the blank)

and where an encoder reads a source and a decoder with a KV cache answers it, logits [B, S, V] of the next token:

    translate    the source is a text, token ids [B, E]            transcribe   speech, mel features [B, mels, frames]
"""
HEADLESS = frozenset({"embed", "embed_image"})
"""Tasks whose output are hidden states; all others have logits."""
OF_IMAGES = frozenset({"embed_image", "classify_image"})
"""Tasks whose input are pixels and not token ids."""
WITHOUT_TOKENS = OF_IMAGES | {"ctc"}
"""Tasks of one model whose input are numbers and not token ids: nothing is looked up, and nothing is padded."""
FROM_FILES = WITHOUT_TOKENS | {"transcribe"}
"""Tasks that are calibrated and verified on the files of a folder, pictures or sounds, and not on a text."""
VECTORS = ("image_embeds", "pooler_output")
"""Names of outputs that hold an image's vector as its model makes it; the first that there is counts."""

EMBEDS = "inputs_embeds"
"""Name of the input of a decoder's graph that reads vectors in the place of tokens; also of the setting that asks."""
GRID = "grid"
"""Name of the setting that says how large the parts of a picture are, where lists of them are the graph's inputs."""
KERNELS = "kernels"
"""Name of the setting that asks for products by roundexport's own operator."""

PAIRS: tuple[Task, ...] = ("translate", "transcribe")
"""Tasks of models with an encoder and a decoder."""


def input_of(task: Task) -> str:
    """Name of the input whose rows are the samples."""
    if task in OF_IMAGES:
        return "pixel_values"
    return {"transcribe": "input_features", "ctc": "input_values"}.get(task, "input_ids")


PoolingMode = Literal["mean", "cls", "last", "max", "mean_sqrt_len", "weightedmean", "modules", "graph", "head"]
"""``modules``: several ways side by side, or modules behind the pooling; files in the folder say which.

``graph``, of images ``head``: vectors come out of the graph; nothing is left to do.
"""


class Pooling(TypedDict):
    """How an encoder's hidden states become one vector, and whether that is scaled to length 1.

    ``head``: the model makes the vector itself, and the graph gives it beside the hidden states (images).
    """

    mode: PoolingMode
    normalize: bool


POOLED = "sentence_embedding"
"""Name of a graph's output where it pools."""


def output_of(task: Task, pooling: Pooling | None = None) -> str:
    """Name of the output of a graph for this task, pooled so."""
    if pooling is not None and pooling["mode"] == "graph":
        return POOLED
    return "last_hidden_state" if task in HEADLESS else "logits"


class KvLayer(TypedDict):
    """Key and value heads of one attention layer with a cache, in order of its index."""

    layer: int
    num_kv_heads: int
    head_dim: int
