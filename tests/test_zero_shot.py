"""Zero-shot accuracy: against log-likelihoods summed by hand, from made-up files of each format."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import cli
from secateur.errors import RecipeError, SourceError
from secateur.evaluation.zero_shot import TASKS, check_tasks, zero_shot
from secateur.evaluation.zero_shot_data import read_local

WORDS = ["a cat", "two", "the long green river", "salt", "old iron", "x", "seven days", "no", "why"]


def word(number: int) -> str:
    return WORDS[number % len(WORDS)]


#: task -> rows as their publishers write them; labels alternate so that accuracy is neither 0 nor 1
PIQA = [{"goal": f"keep {word(n)}", "sol1": word(3 * n + 1), "sol2": word(n + 2)} for n in range(8)]
LABELS = [n % 2 for n in range(8)]
SCIQ = [
    {
        "question": f"What is {word(n)}?",
        "support": "" if n % 3 else f" About {word(n)}.",
        **{f"distractor{i}": word(n + 2 * i) for i in (1, 2, 3)},
        "correct_answer": word(n + 1),
    }
    for n in range(8)
]
BOOLQ = [
    {"question": f"is it {word(n)}", "passage": f"It is {word(n)}.", "answer": n % 2 == 0}
    for n in range(6)
]
WINOGRANDE = [
    {
        "sentence": f"{word(n)} met it because _ was {word(n + 4)}.",
        "option1": word(n + 1),
        "option2": word(n + 2),
        "answer": str(1 + n % 2),
    }
    for n in range(6)
]
LOGIQA = [
    ("abcd"[n % 4], f"All is {word(n)}", "So?", [word(n + i) for i in range(4)]) for n in (0, 1, 2)
]
MMLU = {
    subject: [
        [f"Which is {word(n)}?", *(word(n + i) for i in range(4)), "ABCD"[n % 4]] for n in rows
    ]
    for subject, rows in (("anatomy", range(3)), ("virology", range(3, 8)))
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """One made-up file of each format."""

    def lines(rows: list[Any]) -> str:
        return "".join(json.dumps(row) + "\n" for row in rows)

    folder = tmp_path / "data" / "zeroshot"
    (folder / "mmlu_test").mkdir(parents=True)
    (folder / "boolq_dev.jsonl").write_text(lines(BOOLQ))
    (folder / "piqa_valid.jsonl").write_text(lines(PIQA))
    (folder / "piqa_valid-labels.lst").write_text("".join(f"{n}\n" for n in LABELS))
    (folder / "sciq_test.jsonl").write_text(lines(SCIQ))
    (folder / "winogrande_dev.jsonl").write_text(lines(WINOGRANDE))
    (folder / "logiqa1_Test.txt").write_text(
        "".join(
            "\n".join(["", a, c, q, *(f"{x}.{o}" for x, o in zip("ABCD", options, strict=True))])
            + "\n"
            for a, c, q, options in LOGIQA
        )
    )
    for subject, rows in MMLU.items():
        with (folder / "mmlu_test" / f"{subject}_test.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return folder.parent


# ---- the reference: prompts written out, log-likelihoods summed by hand --------------------------

Item = tuple[list[tuple[str, str]], int]  # (prompt, continuation) of each choice, the right one


def items(task: str) -> list[Item]:
    found: list[Item]
    if task == "boolq":
        found = []
        for r in BOOLQ:
            prompt = f"{r['passage']}\nQuestion: {r['question']}?\nAnswer:"
            found.append(([(prompt, " no"), (prompt, " yes")], int(bool(r["answer"]))))
        return found
    if task == "piqa":
        return [
            ([(f"Question: {r['goal']}\nAnswer:", f" {r[s]}") for s in ("sol1", "sol2")], label)
            for r, label in zip(PIQA, LABELS, strict=True)
        ]
    if task == "sciq":
        keys = ("distractor1", "distractor2", "distractor3", "correct_answer")
        found = []
        for r in SCIQ:
            prompt = f"{r['support'].lstrip()}\nQuestion: {r['question']}\nAnswer:"
            found.append(([(prompt, f" {r[k]}") for k in keys], 3))
        return found
    if task == "winogrande":
        found = []
        for r in WINOGRANDE:
            before, after = r["sentence"].split("_")
            pairs = [(before + r[o], " " + after.strip()) for o in ("option1", "option2")]
            found.append((pairs, int(r["answer"]) - 1))
        return found
    if task == "logiqa":
        found = []
        for answer, context, question, options in LOGIQA:
            listed = "".join(f"{x}. {o}\n" for x, o in zip("ABCD", options, strict=True))
            prompt = f"Passage: {context}\nQuestion: {question}\nChoices:\n{listed}Answer:"
            found.append(([(prompt, f" {o}") for o in options], "abcd".index(answer)))
        return found
    found = []
    for subject, rows in MMLU.items():
        about = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        for question, *choices, letter in rows:
            listed = "".join(f"{x}. {c}\n" for x, c in zip("ABCD", choices, strict=True))
            prompt = f"{about}{question}\n{listed}Answer:"
            found.append(([(prompt, f" {x}") for x in "ABCD"], "ABCD".index(letter)))
    return found


def by_hand(folder: Path, task: str) -> tuple[float, float]:
    """acc and acc_norm."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = right_by_byte = 0
    found = items(task)
    for pairs, answer in found:
        scores = []
        for prompt, continuation in pairs:
            ids = tokenizer(prompt + continuation)["input_ids"]
            count = len(ids) - len(tokenizer(prompt)["input_ids"])
            ids = ids[-129:]  # 128 positions, and one more that is only predicted
            with torch.no_grad():
                logs = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
            scores.append(
                sum(float(logs[i - 1, ids[i]]) for i in range(len(ids) - count, len(ids)))
            )
        lengths = [len(continuation) - 1 for _, continuation in pairs]  # without the space
        right += scores.index(max(scores)) == answer
        normed = [s / n for s, n in zip(scores, lengths, strict=True)]
        right_by_byte += normed.index(max(normed)) == answer
    return right / len(found), right_by_byte / len(found)


@pytest.mark.parametrize("task", TASKS)
def test_accuracy_is_what_a_hand_finds(
    task: str, files: Path, model_folder: Callable[[str], Path]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    folder = model_folder("llama-gqa-tied")
    (score,) = zero_shot(folder, [task], data_dir=files)
    acc, norm = by_hand(folder, task)
    count = len(items(task))
    assert score.acc == pytest.approx(acc)
    assert score.acc_norm is None or score.acc_norm == pytest.approx(norm)
    assert (score.acc_norm is None) == (task in ("boolq", "winogrande", "mmlu"))
    assert (score.items, score.of, score.origin) == (count, count, "local files")
    if task != "mmlu":  # the error of a mean of zeros and ones
        assert score.acc_error == pytest.approx((acc * (1 - acc) / (count - 1)) ** 0.5)


def test_limit_takes_the_first_and_says_so(
    files: Path,
    model_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    folder = model_folder("llama-gqa-tied")
    command = ["eval", str(folder), "--tokens", "0", "--length", "64", "--windows", "1"]
    command += ["--tasks", "piqa,mmlu", "--limit", "4", "--data-dir", str(files)]
    outputs = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["secateur", *command])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    rows = {line.split()[0]: line.split() for line in outputs[0].splitlines() if line.split()}
    assert rows["piqa"][-2:] == ["4", "8"]
    assert rows["mmlu"][5:] == ["7", "8", "in", "2", "subjects"]
    assert "--limit 4: the first 4 of each task, of each subject of mmlu; ±" in outputs[0]


def test_a_pruned_folder_does_not_run_its_own_code(
    files: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    import secateur

    recipe = secateur.Recipe(remove="10%", method="magnitude-sp", layout="per-layer")
    out = secateur.prune(model_folder("llama-gqa-tied"), tmp_path / "out", recipe).out
    code = out / "modeling_secateur.py"
    assert code.is_file()
    code.write_text("raise RuntimeError('this was run')\n")
    (score,) = zero_shot(out, ["piqa"], data_dir=files)
    assert score.items == len(PIQA)


# ---- refusals --------------------------------------------------------------------------------


def test_unknown_task() -> None:
    with pytest.raises(RecipeError) as error:
        check_tasks(["piqa", "arc"], None)
    assert str(error.value) == (
        "task arc is not known: tasks are boolq, piqa, sciq, winogrande, logiqa, mmlu"
    )


def test_no_task_and_no_items() -> None:
    with pytest.raises(RecipeError) as error:
        check_tasks([], None)
    assert str(error.value) == (
        "--tasks names no task: give some of boolq, piqa, sciq, winogrande, logiqa, mmlu, with "
        "commas between them"
    )
    with pytest.raises(RecipeError) as error:
        check_tasks(["piqa"], 0)
    assert str(error.value) == "--limit is 0: give 1 or more items, or leave it out for all"


def test_harness_not_installed(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError) as error:
        zero_shot("never opened", ["piqa"], data_dir=files)
    assert str(error.value) == (
        "--tasks needs the package lm-eval, which is not installed: "
        "pip install 'secateur[zero-shot]'"
    )


@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("piqa", "piqa_valid-labels.lst"),
        ("mmlu", "mmlu_test/*_test.csv"),
        ("sciq", "sciq_test.jsonl"),
    ],
)
def test_missing_file(task: str, file: str, files: Path) -> None:
    for path in (files / "zeroshot").glob(file):
        path.unlink()
    with pytest.raises(SourceError) as error:
        zero_shot("never opened", [task], data_dir=files)
    assert str(error.value) == (
        f"task {task} needs {file}, which is not in {files / 'zeroshot'}: put it there, or leave "
        "out --data-dir to fetch the task from the hub"
    )


def test_damaged_files(files: Path) -> None:
    path = files / "zeroshot" / "sciq_test.jsonl"
    path.write_text('{"question": "x"}\n')
    with pytest.raises(SourceError) as error:
        read_local("sciq", files)
    assert str(error.value) == (
        f"task file {path} cannot be read (KeyError: 'support'): fetch it again; "
        "docs/zero-shot.md says what it should hold"
    )
    path.write_text("\n")
    with pytest.raises(SourceError) as error:
        read_local("sciq", files)
    assert str(error.value) == f"task file {path} holds no items: fetch it again"
    (files / "zeroshot" / "piqa_valid-labels.lst").write_text("0\n")
    with pytest.raises(SourceError, match="ValueError"):
        read_local("piqa", files)


@pytest.mark.parametrize(
    ("task", "count"),
    [("boolq", 3270), ("piqa", 1838), ("sciq", 1000), ("winogrande", 1267), ("logiqa", 651),
     ("mmlu", 14042)],
)  # fmt: skip
def test_real_files(data_dir: Path, task: str, count: int) -> None:
    if not (data_dir / "zeroshot").is_dir():
        pytest.skip(f"no zero-shot tasks at {data_dir}")
    assert sum(map(len, read_local(task, data_dir).values())) == count
