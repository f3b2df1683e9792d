"""Memory and CPU seconds of cutting the first block of a big model, without a run around it.

    python bench/one_block.py FOLDER [--method obs] [--windows 38] [--apart 3] [--set groups=keep]

A fifth of the block's parameters goes. Its input is the embedding of random tokens, in windows of
128, the last of which are kept apart to judge fits by: 38 windows are ten with four copies of the
seven that no fit is judged by. FOLDER is one that ``bench/big_models.py write`` has made.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

LENGTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--method", default="comp")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--apart", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], dest="options")
    args = parser.parse_args()
    import torch
    import yaml

    from secateur.checkpoint import open_checkpoint
    from secateur.engine import Engine
    from secateur.forms import Form
    from secateur.methods import Method, Share, get_method
    from secateur.outputs import hf
    from secateur.plans import BlockCut, Plan, Tensors
    from secateur.progress import PeakMemory, Progress
    from secateur.streaming import Stream

    options = {key: yaml.safe_load(value) for key, value in (o.split("=") for o in args.options)}
    stream = Stream(open_checkpoint(args.folder))
    method = get_method(args.method, options, Form("coupled"))
    assert isinstance(method, Method)
    share = stream.anatomy.block_parameters // 5
    engine = Engine(
        stream, method, to_remove=share, seed=0, dtype=torch.float16, progress=Progress()
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 200, (args.windows, LENGTH), generator=generator)
    engine.text.windows = lambda _: (tokens, args.apart)  # type: ignore[method-assign]
    plan = Plan(stream.anatomy, [])

    with tempfile.TemporaryDirectory() as out, PeakMemory() as memory:

        def sink(cut: BlockCut, state: Tensors) -> None:
            names = sorted(cut.weights)
            folder = Path(out)
            hf.write_block(folder, plan, cut, state, number=0, blocks=1, dtype=torch.float16)
            cut.weights = hf.stored_weights(folder, plan, 0, 1, names)
            print(f"cut and written: {time.process_time() - began:.1f} s of CPU, {cut.notes}")

        began = time.process_time()
        engine.neuron_stage([0], {0: Share(share)}, tokens, sink=sink)
        spent = time.process_time() - began
    print(f"{spent:.1f} s of CPU, peak {memory.peak / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
