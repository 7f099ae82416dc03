"""Which layers of the sample model get which bits, where the milliseconds are those of Qwen3-0.6B on this machine.

    python samples/plan_at_shapes.py rules.json [--target-speedup 1.3] [--choices 2,4] [--group-size 128]
    roundexport tune samples/model PLAN --finish end_to_end --rules rules.json --embedding-bits none \
        --calibration samples/text/calibration.txt
    python samples/bench_vendor_onnx.py --plan PLAN
    python samples/compare_tuners/compare.py --scheme 4,32,sym --tuner rtn
    python samples/compare_tuners/compare.py --scheme 4,128,asym \
        --tuner "plan=ours:--finish end_to_end --rules rules.json"

``--cost latency`` plans a model with its own scores and its own times.  The weights at hand are those of a model whose
layers are too small for their times to mean anything, so this is the same planner with the scores of the sample model
and the times of products at the shapes of Qwen3-0.6B, module by module.  What comes out is a rules file for the sample
model, whose loss is measured there, and whose schemes bench_vendor_onnx.py carries over to all layers of Qwen3-0.6B.
Times are measured once and kept (roundexport/schemes/kernel_timing.py): run it on an idle machine.
"""

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path

import torch
from bench_vendor_onnx import rule

from roundexport import TuneSettings
from roundexport.calibration.samples import load_calibration
from roundexport.quant.spec import LinearInfo
from roundexport.runtime.machine import instruction_sets
from roundexport.storage.atomic import replace_file
from roundexport.tuning.job import Job

SAMPLES = Path(__file__).resolve().parent
SHAPES = {  # of Qwen3-0.6B, [N, K]
    "self_attn.q_proj": (2048, 1024),
    "self_attn.k_proj": (1024, 1024),
    "self_attn.v_proj": (1024, 1024),
    "self_attn.o_proj": (1024, 2048),
    "mlp.gate_proj": (3072, 1024),
    "mlp.up_proj": (3072, 1024),
    "mlp.down_proj": (1024, 3072),
}


def enlarged(info: LinearInfo) -> LinearInfo:
    """The same layer with the shape it has in Qwen3-0.6B."""
    rows, width = SHAPES[".".join(info.name.split(".")[-2:])]
    return LinearInfo(info.name, width, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rules", type=Path, help="file to write")
    parser.add_argument(
        "--target-speedup", type=float, default=1.3, help="of the blocks' products over 4 bits, block 32"
    )
    parser.add_argument("--choices", default="2,4")
    parser.add_argument("--group-size", type=int, default=128)
    given = parser.parse_args()
    calibration = str(SAMPLES / "text" / "calibration.txt")
    settings = TuneSettings(
        recipe="rtn",
        group_size=given.group_size,
        symmetric=False,
        embedding_bits=None,
        choices=tuple(map(int, given.choices.split(","))),
        cost="latency",
        target_speedup=given.target_speedup,
        calibration=calibration,
    )
    job = Job.of(SAMPLES / "model", settings)
    assert job.plan.bit_allocator is not None
    allocator = dataclasses.replace(
        job.plan.bit_allocator, infos={name: enlarged(info) for name, info in job.plan.bit_allocator.infos.items()}
    )
    ids = load_calibration(job.checkpoint, calibration).ids
    allocation = allocator.choose(
        job.weights, torch.as_tensor(ids), torch.device("cpu"), lambda line: print(line, flush=True)
    )
    rules = [rule(name, spec) for name, spec in allocation.specs().items()]
    replace_file(given.rules, json.dumps(rules, indent=1).encode())
    for row in allocation.rows:
        print(f"{' + '.join(row.layers):90} {row.spec.describe():18} {row.score:.5f} nats {row.cost / 1e3:7.1f} µs")
    sizes = [(spec, allocator.infos[name]) for name, spec in allocation.specs().items()]
    weights = sum(info.in_features * info.out_features for _, info in sizes)
    stored = sum(spec.storage_bits(info.out_features, info.in_features) for spec, info in sizes)
    for bits, count in sorted(Counter(spec.bits for spec, _ in sizes).items()):
        print(f"{count} layers of {bits} bits")
    spent = sum(row.cost for row in allocation.rows) / 1e6
    print(f"{stored / weights:.3f} bits stored per weight")
    print(
        f"a token's products take {spent:.3f} ms of {allocation.budget / 1e6:.3f} allowed; "
        f"{' '.join(instruction_sets())}"
    )


if __name__ == "__main__":
    main()
