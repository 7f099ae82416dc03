"""What optimum and sentence-transformers make of a package, in an environment of theirs; prints JSON.

python optimum_side.py embed FOLDER onnx|openvino TEXT…       vectors by sentence-transformers' backend
python optimum_side.py answer FOLDER CLASS INPUTS.npz BEAMS   tokens by a class of optimum.intel, or optimum.onnxruntime
"""

import json
import sys
from pathlib import Path

import numpy as np

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def embed(folder: str, backend: str, *texts: str) -> list[list[float]]:
    from sentence_transformers import SentenceTransformer

    kept = {"ov_config": FLOAT32} if backend == "openvino" else {}
    model = SentenceTransformer(folder, backend=backend, device="cpu", model_kwargs=kept)
    return model.encode(list(texts)).tolist()


def answer(folder: str, kind: str, inputs: str, beams: str) -> list[list[int]]:
    import torch

    if kind.startswith("ORT"):
        import optimum.onnxruntime

        model = getattr(optimum.onnxruntime, kind).from_pretrained(folder)
    else:
        import optimum.intel

        model = getattr(optimum.intel, kind).from_pretrained(folder, ov_config=FLOAT32)
    with np.load(inputs) as stored:
        given = {name: torch.from_numpy(stored[name]) for name in stored.files}
    return model.generate(**given, num_beams=int(beams), max_new_tokens=16, do_sample=False).tolist()


made = {"embed": embed, "answer": answer}[sys.argv[1]](str(Path(sys.argv[2]).resolve()), *sys.argv[3:])
print(json.dumps(made))
