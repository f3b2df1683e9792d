"""The card of a healed model: that it was trained, on what, and how it was pruned before."""

from __future__ import annotations

from typing import Any

import yaml

from secateur.outputs.card import asked_for, fenced, plain
from secateur.recovery.groupwise import stored_form


def healed_card(record: dict[str, Any], *, name: str, stock: bool) -> str:
    """Text of README.md for the output folder of ``heal``.

    Args:
        record: the content of ``secateur.json``.
        name: of the pruned folder.
        stock: whether stock transformers classes open the folder.
    """
    healed, plan = record["healed"], record["plan"]
    settings, text, held = healed["settings"], healed["text"], healed["held_out_loss"]
    method = str(record["recipe"]["method"])
    header = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["secateur", "pruned", method, "healed", settings["method"]],
    }
    parameters, decoder = plan["parameters"], plan["decoder_parameters"]
    version = plain(record["versions"]["secateur"])
    origin = plain(text["origin"]).replace("|", "\\|")
    trust = "" if stock else ", trust_remote_code=True"
    stored = stored_form(settings["bits"], settings["group"], settings["dtype"])
    return f"""---
{yaml.safe_dump(header, sort_keys=False).rstrip()}
---

# {plain(name)}, healed

Pruned by Secateur {version}, then **healed, which is training**: this is not a training-free model,
and its figures do not belong beside those of training-free ones.

| | before | after | removed |
|---|---|---|---|
| parameters | {parameters["before"]:,} | {parameters["after"]:,} | {plan["share_removed"]:.2%} |
| in decoder blocks | {decoder["before"]:,} | {decoder["after"]:,} \
| {plan["decoder_share_removed"]:.2%} |

{asked_for(record)}

| healing | |
|---|---|
| method | `{settings["method"]}`, {_METHODS[settings["method"]].format(**settings)} |
| text | {origin}, {text["examples"]:,} examples, {text["windows"]:,} windows of \
{settings["length"]} tokens, SHA-256 `{text["sha256"]}` |
| steps | {healed["steps"]} of {settings["batch"]} windows, Adam, learning rate up to \
{settings["lr"]:g}, seed {settings["seed"]} |
| loss on {text["held_out"]} windows kept out | {held["before"]:.4f} before, {held["after"]:.4f} \
after, in nats a token |
{stored}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
```

The recipe that it was pruned by, and the settings that it was healed with:

{fenced(record["recipe"])}

{fenced(settings)}

`secateur.json` holds both with sizes block by block, versions, and hashes. The licence is that of
the original model.
"""


_METHODS = {
    "lora": "rank {rank}, merged into the weights",
    "groupwise": "rank {rank}, {bits} bits in groups of {group} columns, folded into the zero "
    "points",
}
