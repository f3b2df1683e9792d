"""What a healing run was asked to do. Field texts are also the command line's help."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from secateur.errors import RecipeError

#: Factor before B A, often written alpha / r. Tied to neither, so that a learning rate that works
#: for one rank works for another.
SCALING = 2.0
#: Learning rates that worked on a 135M model (docs/healing.md); the adapters of `groupwise` move
#: whole groups of weights at once.
LEARNING_RATES = {"lora": 1e-3, "groupwise": 1e-3}
#: What belongs to `groupwise` alone, with its defaults. With 32 columns and 4 or 5 bits a group is
#: what llama.cpp's q4_1 and q5_1 store, so that the file holds the very same weights.
GROUPWISE = {"bits": 4, "group": 32}


class HealSettings(BaseModel):
    """Everything that decides the bytes of a healed model, besides the model and the text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["lora", "groupwise"] = Field(
        "lora",
        description="lora: adapters, merged; groupwise: groups of columns quantised, adapters "
        "folded into their zero points",
    )
    data: str = Field(
        description="builtin, a text or JSONL file, or c4, wikitext2, ptb, alpaca (training side)"
    )
    text_field: str = Field("text", description="key of the text in JSONL")
    examples: int = Field(2000, ge=1, description="examples of the text, from its start, at most")
    steps: int | None = Field(
        None, ge=1, description="steps of the optimiser; by default one pass over the text"
    )
    length: int = Field(256, ge=8, description="tokens a window")
    batch: int = Field(4, ge=1, description="windows a step")
    rank: int = Field(8, ge=1, description="rank of the adapters")
    lr: float = Field(gt=0, lt=1, description="largest learning rate")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of adapters and order of the text")
    bits: Literal[4, 5, 8] | None = Field(
        None, description="groupwise: bits of a weight: 4, 5 or 8"
    )
    group: int | None = Field(
        None, ge=8, le=4096, description="groupwise: columns that share a scale and a zero point"
    )
    compute: Literal["float32", "bfloat16"] = Field(
        "float32", description="type in which the model runs while it is healed"
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="type of the written weights; auto: as in the source, for groupwise float32",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_the_method(cls, fields: Any) -> Any:
        """Defaults that depend on the method; what only `groupwise` knows is refused elsewhere."""
        method = fields.get("method", "lora")
        given = {key: value for key, value in fields.items() if value is not None}
        if method == "groupwise":
            given = {**GROUPWISE, **given}
        else:
            for name in GROUPWISE:
                if name in given:
                    raise ValueError(
                        f"--{name} is for --method groupwise: {method} quantises nothing; leave "
                        f"out --{name}"
                    )
        return {"lr": LEARNING_RATES.get(method, 1e-3), **given}


def make_settings(**fields: Any) -> HealSettings:
    """Checked settings; None stands for what was not given.

    Raises:
        RecipeError: with one line that names the option.
    """
    try:
        return HealSettings(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        text = first["msg"].removeprefix("Value error, ")
        name = ".".join(str(part) for part in first["loc"])
        raise RecipeError(
            f"--{name} is {first.get('input')!r}: {_lower(text)}" if name else text
        ) from error


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
