"""benchmarks/e2e.py: rows, JSON, and what it does where something cannot be measured."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.models
TINY = ["--model", "tiny", "--device", "cpu", "--tokens", "16", "--prompt", "6", "--prefill", "16"]


@pytest.fixture
def e2e(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import e2e

    return e2e


@pytest.fixture
def steady(e2e, monkeypatch):
    """Calls of `generate` that are real, but for what they take: 20 ms and 10 more a token, whatever else runs here."""
    called = e2e.generate

    def generate(subject, ids, **limits):
        _, tokens = called(subject, ids, **limits)
        return 0.02 + 0.01 * tokens, tokens

    monkeypatch.setattr(e2e, "generate", generate)


@pytest.fixture
def run(e2e, steady, monkeypatch, capsys, tmp_path):
    """Runs the program; returns its exit status, the cells of its table, all it printed, and what it saved."""

    def run(*options):
        file = tmp_path / "rows.json"
        monkeypatch.setattr(sys, "argv", ["e2e.py", *options, "--json", str(file)])
        status = e2e.main()
        text = capsys.readouterr().out
        table = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines() if line.count(" | ") > 5]
        return status, table, text, json.loads(file.read_text()) if file.exists() else None

    return run


def test_rows_before_and_after(run):
    more = ["--batch", "1", "3", "--depth", "9", "--rounds", "2"]
    status, table, text, saved = run(*TINY, "--weights", "int4-head8", *more)
    assert status == 0 and "int4-head8 weights, keep cache: patched in" in text
    header, *rows = table
    assert [cell.split()[0] for cell in header][:5] == ["model", "weights", "cache", "batch", "test"]
    tests = ["tg16", "tg16 @ d9", "pp16"]
    expected = [(w, b, t) for w in ("eager", "int4-head8") for b in (1, 3) for t in tests]
    assert [(r[1], int(r[3]), r[4]) for r in rows] == expected
    assert [(r["weights"], r["batch"], r["test"]) for r in saved["rows"]] == expected
    assert all(("eager" in r[7]) == (r[1] != "eager") for r in rows)
    for r in saved["rows"]:
        assert r["peak_mib"] > 0 and r["warmup_s"] >= 0 and len(r["rounds_s"]) == (1 if r["weights"] == "eager" else 2)
        assert r["ms_token"] == pytest.approx(r["batch"] / r["tokens_s"] * 1e3)
        assert r["tokens_s"] == pytest.approx(r["batch"] * (16 / 0.03 if r["test"] == "pp16" else 100))
        assert ("patch_s" in r) == (r["weights"] != "eager")


def test_a_large_max_length(e2e, monkeypatch):
    model = e2e.build("tiny", "cpu")
    subject = e2e.Subject(model, {"weights": "eager"})
    seconds, tokens = e2e.generate(subject, torch.ones(1, 6, dtype=torch.long), max_length=512, max_time=0.05)
    assert seconds > 0.05 and 1 <= tokens <= 506
    asked = []

    def generate(subject, ids, **limits):
        asked.append(limits)
        tokens = int(limits["max_time"] / 0.005)
        return 0.005 * tokens, tokens

    monkeypatch.setattr(e2e, "generate", generate)
    row = e2e.measure(subject, e2e.Test("tg16 @ L512", 6, 16, max_length=512), batch=2, rounds=1)
    assert row["tokens_s"] == pytest.approx(400) and {limits["max_length"] for limits in asked} == {512}


def test_a_saved_run_prints_again(run, tmp_path):
    _, table, _, saved = run(*TINY, "--weights", "int8")
    (tmp_path / "saved.json").write_text(json.dumps(saved))
    status, again, _, _ = run("--from-json", str(tmp_path / "saved.json"))
    assert status == 0 and again == table


def test_only_ours(run):
    status, _, _, saved = run(*TINY, "--weights", "int8", "--peer", "--rounds", "1")
    assert status == 0 and [r["weights"] for r in saved["rows"]] == ["int8", "int8"]


def test_a_model_at_a_path(run, e2e, tmp_path):
    e2e.build("tiny", "cpu").save_pretrained(tmp_path / "mine")
    status, _, _, saved = run("--model", str(tmp_path / "mine"), *TINY[2:], "--batch", "2")
    assert status == 0 and {r["model"] for r in saved["rows"]} == {"mine"}


def test_a_refused_patch_is_an_error_after_the_other_rows(run):
    status, _, text, saved = run(*TINY, "--weights", '{"nothing": "int8"}', "int8")
    assert status == 1 and "not patched: pattern 'nothing' matches no linear" in text
    assert {r["weights"] for r in saved["rows"]} == {"eager", "int8"}


def test_too_few_tokens_are_an_error(run, e2e, monkeypatch):
    built = e2e.build

    def stopping(*args):
        model = built(*args)
        generate = model.generate
        model.generate = lambda *a, **named: generate(*a, **named)[:, :-1]
        return model

    monkeypatch.setattr(e2e, "build", stopping)
    status, _, text, saved = run(*TINY)
    assert status == 1 and "generate returned 17 new tokens, asked for 18" in text and not saved["rows"]


def test_the_rate_leaves_out_the_prompt_and_the_warmup_the_later_tokens(e2e):
    calls = []

    def seconds(tokens):
        calls.append(tokens)
        return (3.0 if len(calls) == 1 else 0.0) + 0.5 + 0.01 * (tokens - 1)

    steps, warmup = e2e.decode(seconds, tokens=128, rounds=3)
    assert steps == pytest.approx([0.01] * 3) and warmup == pytest.approx(3.5)
    assert calls == [144, 16, 16, 144, 16, 144, 16, 144]


def test_the_rate_of_calls_that_end_with_their_time(e2e):
    calls = []

    def run(budget):  # 10 ms a step after 40 ms for the prompt; 3 s more at first
        calls.append(budget)
        tokens = 1 + int(max(0.0, budget - 0.04) / 0.01)
        return 0.04 + 0.01 * (tokens - 1) + (3.0 if len(calls) == 1 else 0.0), tokens

    steps, warmup = e2e.decode_for(run, tokens=128, rounds=2)
    assert steps == pytest.approx([0.01] * 2) and warmup == pytest.approx(3.04)
    with pytest.raises(RuntimeError, match="too uneven"):
        e2e.decode_for(lambda budget: (budget, 4), tokens=8, rounds=1)
    with pytest.raises(RuntimeError, match="too uneven"):
        e2e.decode(lambda tokens: 1.0, tokens=8, rounds=1)


@pytest.mark.parametrize(
    "options, message",
    [(["--tokens", "0"], "--tokens must be at least 1"), (["--max-length", "10"], "--max-length must hold")],
)
def test_bad_options(run, capsys, options, message):
    with pytest.raises(SystemExit):
        run(*TINY, *options)
    assert message in capsys.readouterr().err
