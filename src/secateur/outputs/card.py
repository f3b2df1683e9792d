"""The model card: what was asked, what was reached, how to open it."""

from __future__ import annotations

import html
import math
import re
from pathlib import Path
from typing import Any

import yaml

from secateur.magnitude import said
from secateur.plans import Plan


def model_card(plan: Plan, record: dict[str, Any], *, source: str, stock: bool) -> str:
    """Text of README.md for the output folder.

    Args:
        record: the content of ``secateur.json``.
        source: what the user called the model.
        stock: whether stock transformers classes open the folder.
    """
    before, after = plan.sizes_before(), plan.sizes()
    header = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["secateur", "pruned", str(record["recipe"]["method"])],
    }
    if "/" in source and not Path(source).exists():
        header["base_model"] = source
    name = plain(Path(source).name.removesuffix(".gguf") or source)
    of_decoder = after.decoder_share_removed(before)
    trust = "" if stock else ", trust_remote_code=True"
    why = (
        "Every block has the shapes of the stock class, so no extra code is needed."
        if stock
        else f"{plan.why_code}, so the folder carries `modeling_secateur.py`, which "
        "is what `trust_remote_code=True` allows to run."
    )
    cost = record["form"].get("held_out_loss", {})
    if len(cost) == 2:
        rise = math.expm1(cost["uniform"] - cost["per-layer"])
        why += (
            f" One width for all blocks costs {rise:.1%} of perplexity against own widths, "
            "on calibration windows kept out of the statistics."
        )
    zeros = record["reached"].get("zeros")
    tags = ["sparse"] * bool(zeros)
    header["tags"] = [*header["tags"], *tags]
    steps = [step for cut in plan.blocks for step in cut.steps]
    if steps:
        why += f" Solvers could not go the straight way everywhere: {'; '.join(steps)}."
    if adds := said(cut.notes for cut in plan.blocks):
        why += f" {adds}"
    return f"""---
{yaml.safe_dump(header, sort_keys=False).rstrip()}
---

# {name}, pruned

Made by Secateur {record["versions"]["secateur"]} without
training.

| | before | after | removed |
|---|---|---|---|
| parameters | {before.parameters:,} | {after.parameters:,} | {after.share_removed(before):.2%} |
| in decoder blocks | {before.decoder:,} | {after.decoder:,} | {of_decoder:.2%} |
| blocks | {plan.anatomy.layers} | {len(plan.blocks)} | {len(plan.removed_layers)} |

{asked_for(record)}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
```

{why}

The recipe, with which the same command gives the same bytes:

{fenced(record["recipe"])}

`secateur.json` holds sizes block by block, versions, and the hash of the calibration tokens;
{plan.held_in}. `report.html`
shows it all in pictures, with the time and memory of one run: it is the one file that is not the
same each time. The licence is that of the original model.
"""


def fenced(values: Any) -> str:
    """Values as a block of YAML code, which none of them can end."""
    text = yaml.safe_dump(values, sort_keys=True, allow_unicode=True).rstrip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{text}\n{fence}"


def plain(text: str) -> str:
    """A name as Markdown that shows it: on one line, no HTML, no link, no code."""
    line = "".join(sign if sign.isprintable() else " " for sign in text)
    return re.sub(r"([\\`\[\]])", r"\\\1", html.escape(line, quote=False))


def asked_for(record: dict[str, Any]) -> str:
    """What was to go, in a sentence or two; and of zeros, that they make nothing smaller.

    Args:
        record: the content of ``secateur.json``.
    """
    from secateur.methods.sparse import SAME_SIZE

    asked, zeros = record["asked"], record["reached"].get("zeros")
    gone = f"Asked was the removal of {asked['parameters_removed']:,} parameters."
    if zeros is None:
        return gone
    pattern = plain(f"--sparsity {record['recipe']['sparsity']}")
    if "zeros" in asked:
        made = f"Asked were {asked['zeros']:,} zeros ({pattern}), made were {zeros:,}"
    else:
        made = f"{gone} What is left has {zeros:,} zeros ({pattern})"
    return f"{made}: {SAME_SIZE}."
