"""A photo-sized picture shown to a package, by this runtime or by a vendor's client: seconds, memory, answer.

    python samples/random_checkpoint.py eyes --shape smolvlm-256m
    roundexport convert eyes seeing --part all --recipe rtn
    python samples/picture_answers.py seeing/onnx
    python samples/picture_answers.py seeing/openvino --client openvino-genai       families that VLMPipeline knows
    python samples/picture_answers.py seeing/onnx --client onnxruntime-genai        Qwen2.5-VL and Qwen3-VL

The picture is drawn: blocks of color as large as those of a photo's things, 1600 x 1200 pixels.  Every further one is
another, so that nothing is found in a cache; the first is a warm-up.  Answers go on to their full length, greedy.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from roundexport.runtime.machine import machine_info

QUESTION = "What is in this picture?"
Answer = Callable[[Path, int], Iterator[object]]
"""Of a picture's file and a number of tokens: a thing for each token, when it is there."""


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Soft blocks of color."""
    blocks = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


def roundexport(package: Path) -> Answer:
    from roundexport.runtime import GenerationSettings, load

    opened: Any = load(package)

    def answer(file: Path, count: int) -> Iterator[object]:
        prompt = opened.encode(QUESTION, chat=True, pictures=[file])
        print(f"{len(prompt)} tokens", flush=True)
        yield from opened.generate([prompt], GenerationSettings(max_new_tokens=count, ignore_eos=True))

    return answer


def openvino_genai(package: Path) -> Answer:
    import openvino
    import openvino_genai

    pipeline = openvino_genai.VLMPipeline(str(package), "CPU")

    def answer(file: Path, count: int) -> Iterator[object]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = count, True, False
        pixels = openvino.Tensor(np.asarray(Image.open(file).convert("RGB"))[None])
        done = pipeline.generate(QUESTION, images=[pixels], generation_config=config)
        times = done.perf_metrics
        yield times.get_ttft().mean / 1000
        yield from [times.get_tpot().mean / 1000] * (times.get_num_generated_tokens() - 1)

    return answer


def onnxruntime_genai(package: Path) -> Answer:
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(package))
    read, start = model.create_multimodal_processor(), "<|vision_start|><|image_pad|><|vision_end|>"

    def answer(file: Path, count: int) -> Iterator[object]:
        inputs = read(f"{start}{QUESTION}", images=onnxruntime_genai.Images.open(str(file)))
        generator = onnxruntime_genai.Generator(model, onnxruntime_genai.GeneratorParams(model))
        generator.set_inputs(inputs)
        for _ in range(count):
            generator.generate_next_token()
            yield generator.get_next_tokens()[0]

    return answer


CLIENTS = {
    "roundexport": roundexport,
    "openvino-genai": openvino_genai,
    "onnxruntime-genai": onnxruntime_genai,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--client", choices=CLIENTS, default="roundexport")
    parser.add_argument("--size", type=int, nargs=2, default=(1600, 1200), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=3)
    options = parser.parse_args()
    began = time.perf_counter()
    answer = CLIENTS[options.client](options.package)
    print(f"opened in {time.perf_counter() - began:.1f} s, {peak():.0f} MiB")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.pictures):
            file = Path(folder) / f"{number}.png"
            picture(*options.size, number).save(file)
            begin = time.perf_counter()
            times = [(time.perf_counter(), step) for step in answer(file, options.tokens)]
            first, last = times[0][0] - begin, times[-1][0] - times[0][0]
            if isinstance(times[0][1], float):  # the client's own figures
                first, last = times[0][1], sum(float(str(step)) for _, step in times[1:])
            print(
                f"picture {number}: {first:.2f} s until the first of {len(times)} tokens, "
                f"{1000 * last / max(1, len(times) - 1):.1f} ms for each further one, peak {peak():.0f} MiB"
            )
    print(json.dumps(machine_info()))


def peak() -> float:
    """Largest resident size so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
