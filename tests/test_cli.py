"""The command line: its flags are frozen, its exit codes kept, its output made for people or for machines.

Most tests call it in this process; those about signals start a real one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from tiny import contents, copy_folder, edit_tensors, make_checkpoint, make_recipe, make_text, make_tokenizer

import ternarize
from ternarize import Recipe, cli, printing, progress
from ternarize.conversion import convert
from ternarize.errors import StoppedError
from ternarize.export import targets
from ternarize.kernels.cpu import paths as native_paths
from ternarize.progress import Progress, parse_duration
from ternarize.report import Report

Run = Callable[..., tuple[int, str, str]]
COMMAND = [sys.executable, "-m", "ternarize.cli"]


@pytest.fixture
def settings(text: Path) -> list[str]:
    """The session's recipe as options."""
    changes = {"grid": "dlt", "group_size": 12, "int8_group_size": 20}
    changes |= {"calibration.samples": 16, "calibration.length": 64}
    options = ["--recipe", "fast", "--text", str(text)]
    for key, value in changes.items():
        options += ["--set", f"{key}={value}"]
    return options


# -- the surface ------------------------------------------------------------------------------------------------------


def test_flags_are_frozen() -> None:
    """Scripts depend on them: a change here belongs into the changelog."""
    group = typer.main.get_command(cli.app)
    found = {
        name: sorted(option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts))
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    assert found == {
        "convert": [
            "--allow-lossy", "--device", "--force", "--format", "--json", "--output", "--plan", "--private", "--push",
            "--quiet", "--recipe",
            "--resume", "--revision", "--set", "--target-size", "--text", "--time-budget", "-o", "-q", "-r", "source",
        ],
        "export": ["--allow-lossy", "--force", "--json", "--output", "--quiet", "--to", "-o", "-q", "folder"],
        "verify": [
            "--export", "--json", "--length", "--quiet", "--student", "--text", "--windows", "-q", "path",
        ],
        "import": ["--force", "--json", "--output", "--quiet", "--revision", "--skip", "-o", "-q", "source"],
        "plan": ["--json", "--recipe", "--revision", "--set", "--target-size", "--text", "-r", "source"],
        "evaluate": [
            "--activations", "--batch-size", "--device", "--dtype", "--items", "--json", "--length", "--no-save",
            "--quiet", "--revision", "--save", "--task-data", "--tasks", "--teacher", "--text", "--windows", "-q",
            "folder",
        ],
        "generate": [
            "--chat", "--device", "--dtype", "--revision", "--seed", "--temperature", "--tokens", "-n", "folder",
            "prompt",
        ],
        "inspect": ["--json", "--plot", "--teacher", "--text", "--worst", "folder"],
        "doctor": [],
        "bench": [
            "--activations", "--device", "--dtype", "--json", "--prompt", "--quiet", "--revision", "--rounds",
            "--threads", "--tokens", "-n", "-q", "folder",
        ],
        "distill": [
            "--device", "--force", "--json", "--output", "--quiet", "--resume", "--revision", "--set", "--teacher",
            "--text", "--time-budget", "-o", "-q", "folder",
        ],
        "chat": [
            "--device", "--dtype", "--revision", "--seed", "--system", "--temperature", "--tokens", "-n", "folder",
        ],
        "serve": ["--device", "--dtype", "--host", "--port", "--revision", "folder"],
        "push": [
            "--base", "--dry-run", "--force", "--json", "--private", "--quiet", "--revision", "-q", "folder", "repo",
        ],
    }  # fmt: skip


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"ternarize {ternarize.__version__}\n", "")


def test_help_names_every_command_and_exit_code(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for word in (
        "convert",
        "plan",
        "evaluate",
        "generate",
        "inspect",
        "doctor",
        "0 done",
        "2 bad input",
        "3 unsupported",
        "4 st",
    ):
        assert word in out


COMMANDS = sorted(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def test_help_says_of_every_command_what_it_does_without_cutting_it_short(run: Run) -> None:
    _, out, _ = run("--help")
    shown = dict(re.findall(r"^  (\w+)  +(.*)$", out.partition("Commands:")[2], re.MULTILINE))
    assert sorted(shown) == COMMANDS
    assert not [name for name, line in shown.items() if line.endswith("...")]


def test_help_of_export_names_every_format() -> None:
    parameters = typer.main.get_command(cli.app).commands["export"].params  # type: ignore[attr-defined]
    (said,) = [parameter.help for parameter in parameters if parameter.name == "to"]
    assert set(re.findall(r"[\w-]+", said)) >= set(targets())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command: str) -> None:
    parameters = typer.main.get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
    assert all(parameter.help for parameter in parameters), [p.name for p in parameters if not p.help]


@pytest.mark.parametrize(
    "arguments",
    [["convert"], ["covnert", "x"], ["convert", "x", "--group-size", "3"], ["generate", "x", "y", "-n", "0"]],
)
def test_wrong_usage_exits_2(arguments: list[str], run: Run) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_mistyped_names_are_answered_with_the_nearest(run: Run) -> None:
    assert "'convert'" in run("converr")[2]
    assert "--recipe" in run("convert", "x", "--recipi", "y")[2]
    assert "'balanced'" in run("convert", "x", "--recipe", "balancd")[2]
    assert "'group_size'" in run("convert", "x", "--set", "grop_size=3")[2]
    assert "did you mean 'smollm2-135m'?" in run("plan", "sample:smolm2-135m")[2]
    for mistyped, format_ in (("gguf:q2_0", "gguf-q2_0"), ("compressed_tensors", "compressed-tensors"), ("mxl", "mlx")):
        assert (
            f"format {mistyped!r} is not known (did you mean {format_!r}?)" in run("export", "x", "--to", mistyped)[2]
        )


@pytest.mark.parametrize(
    "command", [["generate", "x", "y"], ["chat", "x"], ["serve", "x"], ["evaluate", "x"], ["bench", "x"]]
)
def test_a_mistyped_dtype_is_said_before_anything_is_fetched(
    command: list[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(*_: Any) -> None:
        raise AssertionError("a checkpoint was looked for")

    monkeypatch.setattr("ternarize.sources.resolve", fetched)
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    code, _, err = run(*command, "--dtype", "bfloat61")
    assert code == 2
    assert "did you mean 'bfloat16'?" in err


def test_bug_is_not_dressed_up_as_bad_input(run: Run, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("ternarize.plan.make_plan", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run("plan", llama)


def test_bench_times_what_it_says(run: Run, ternary: Path, llama: Path) -> None:
    options = ["--prompt", 8, "--tokens", 4, "--rounds", 2, "--threads", 1, "--threads", 2]
    before = torch.get_num_threads()
    for folder in (ternary, llama):
        code, out, _ = run("bench", folder, *options, "--json")
        assert code == 0
        one, two = json.loads(out)
        assert (one["threads"], two["threads"], one["prompt"], one["tokens"]) == (1, 2, 8, 4)
        for speed in (one, two):
            assert len(speed["prefill"]) == len(speed["decode"]) == 2
            assert all(figure > 0 for figure in [*speed["prefill"], *speed["decode"], speed["ready"]])
    assert torch.get_num_threads() == before
    code, out, _ = run("bench", ternary, *options)
    assert code == 0
    for words in ("ready in", "prefill of 8 tokens, 1 thread ", "decode of 4 tokens, 2 threads", "peak memory"):
        assert words in out


@pytest.mark.parametrize("command", ["evaluate", "generate", "plan"])
def test_ctrl_c_exits_4_from_every_command(
    command: str, run: Run, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ternarize.sources.resolve", interrupted)
    code, _, err = run(command, llama, *(["prompt"] if command == "generate" else []))
    assert code == 4
    assert "stopped" in err
    assert "Traceback" not in err


# -- convert and plan -------------------------------------------------------------------------------------------------


def test_convert_gives_the_folder_that_the_library_gives(
    run: Run, llama: Path, ternary: Path, settings: list[str], tmp_path: Path
) -> None:
    code, out, err = run("convert", llama, "-o", tmp_path / "ternary", *settings)
    assert code == 0, err
    assert contents(tmp_path / "ternary") == contents(ternary)
    report = Report.read(ternary)
    assert f"bits per ternary weight      {report.bits_per_ternary_weight:.3f}" in out
    assert f"bits per weight, whole file  {report.bits_per_weight:.3f}" in out
    assert f"ternarize evaluate {tmp_path / 'ternary'} --teacher {llama}" in out


def test_converted_folder_is_named_after_the_source_where_no_output_is_given(
    run: Run, llama: Path, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("convert", f"{llama}/", *settings)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["llama-ternary"]


def test_json_of_convert_is_the_report_and_alone_on_standard_output(
    run: Run, llama: Path, settings: list[str], tmp_path: Path
) -> None:
    code, out, _ = run("convert", llama, "-o", tmp_path / "out", "--json", *settings)
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "out" / "report.json").read_text())


def test_quiet_says_nothing_on_standard_error(run: Run, llama: Path, settings: list[str], tmp_path: Path) -> None:
    code, _, err = run("convert", llama, "-o", tmp_path / "out", "--quiet", *settings)
    assert (code, err) == (0, "")


def test_experts_fitted_without_data_are_said(run: Run, settings: list[str], tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "mixtral")
    settings += ["--set", "calibration.samples=1", "--set", "calibration.length=8"]
    code, _, err = run("convert", source, "-o", tmp_path / "out", *settings)
    count = sum(entry.data_free for entry in Report.read(tmp_path / "out").linears)
    assert code == 0
    assert 0 < count < 24
    assert re.search(rf"{count} experts saw too few .*\.experts\.\d\..* more calibration\.samples", err)


@pytest.mark.parametrize("command", [["plan"], ["convert", "--plan"]])
def test_plan_writes_nothing_and_foretells_the_bytes(
    command: list[str], run: Run, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(tmp_path / "source", hidden_size=128, intermediate_size=320)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run(*command, source, *settings, "--json")
    assert code == 0
    made = json.loads(out)
    code, table, _ = run(*command, source, *settings)
    assert code == 0
    assert "14 linears" in table
    assert "model.layers.*.input_layernorm.weight (2): one value per feature" in table
    assert "model.embed_tokens [64, 128] in int8, lm_head [64, 128] in int8" in table
    assert sorted(tmp_path.rglob("*")) == before
    assert run("convert", source, "-o", "out", *settings)[0] == 0
    real = (tmp_path / "work" / "out" / "model.safetensors").stat().st_size
    assert abs(made["output_bytes"] - real) <= max(0.02 * real, 5000)


def test_recipe_may_be_a_file(run: Run, llama: Path, recipe: Recipe, ternary: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml())
    assert run("convert", llama, "-o", tmp_path / "ternary", "-r", tmp_path / "mine.yaml")[0] == 0
    assert contents(tmp_path / "ternary") == contents(ternary)


def test_refused_output_is_untouched_and_exits_2(run: Run, llama: Path, settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    code, out, err = run("convert", llama, "-o", tmp_path, *settings)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {tmp_path} exists and is not empty.")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_unsupported_model_exits_3(run: Run, llama: Path, settings: list[str], tmp_path: Path) -> None:
    source = copy_folder(llama, tmp_path / "vision")
    (source / "config.json").write_text('{"model_type": "vit"}')
    code, out, err = run("convert", source, "-o", tmp_path / "out", *settings)
    assert (code, out) == (3, "")
    assert err.startswith("error: ")


def test_stopped_conversion_exits_4(
    run: Run, llama: Path, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise StoppedError("the disk is full")

    monkeypatch.setattr("ternarize.conversion.convert_window", stopped)
    assert run("convert", llama, "-o", tmp_path / "out", *settings) == (4, "", "error: the disk is full\n")


def test_progress_is_plain_lines_where_standard_error_is_no_terminal(
    run: Run, llama: Path, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    code, _, err = run("convert", llama, "-o", tmp_path / "out", *settings)
    assert code == 0
    assert re.fullmatch(r"(converting: 1/2 blocks, about .* left\n)(converting: done in .*\n)?", err)


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Recipe]:
    """A conversion of many blocks: (source, its uninterrupted result, recipe)."""
    folder = tmp_path_factory.mktemp("long")
    source = make_checkpoint(folder / "source", num_hidden_layers=24)
    recipe = make_recipe(text, calibration={"samples": 32})
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    convert(source, folder / "ternary", recipe, progress=Progress(quiet=True))
    return source, folder / "ternary", recipe


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_signal_in_the_middle_leaves_a_run_that_resumes_to_the_same_bits(
    number: signal.Signals, long: tuple[Path, Path, Recipe], run: Run, tmp_path: Path
) -> None:
    source, whole, _ = long
    output = tmp_path / "ternary"
    arguments = ["convert", str(source), "-o", str(output), "-r", str(whole.parent / "recipe.yaml")]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    partial = output.with_name("ternary.partial")
    deadline = time.monotonic() + 120
    while not (partial / "block-00002.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    done = len(list(partial.glob("block-*.json")))
    assert 3 <= done < 24, "the conversion was too fast for this test, or too slow"
    assert not output.exists()
    assert out == ""
    if number == signal.SIGINT:
        assert process.returncode == 4
        assert err.endswith(f"error: stopped: {done} blocks are safe in {partial}. "
                            "Run the same command with --resume to go on.\n")  # fmt: skip
        assert "Traceback" not in err
        assert not set("\r\x1b") & set(err)
    else:
        assert process.returncode == -signal.SIGKILL
    code, _, err = run(*arguments)
    assert code == 2
    assert "--resume" in err
    # A random model: what it is worth is not the point.
    assert run(*arguments, "--resume")[0] in (0, printing.COLLAPSED)
    assert contents(output) == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["ternary"]


# -- the other commands -----------------------------------------------------------------------------------------------


def test_generate_prints_the_prompt_and_what_the_model_goes_on_with(run: Run, ternary: Path) -> None:
    model, tokenizer = ternarize.load(ternary)
    inputs = tokenizer("abc def", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert run("generate", ternary, "abc def", "-n", 12) == (0, f"{expected}\n", "")


def test_generate_works_on_a_float_checkpoint_too(run: Run, llama: Path) -> None:
    code, out, _ = run("generate", llama, "abc", "-n", 3)
    assert code == 0
    assert out.startswith("abc")


def test_generate_writes_alone_whatever_the_checkpoint_asks_for(run: Run, ternary: Path, tmp_path: Path) -> None:
    folder = copy_folder(ternary, tmp_path / "copy")
    expected = run("generate", folder, "abc", "-n", "8")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_beams": 4, "cache_implementation": "static"}))
    assert run("generate", folder, "abc", "-n", "8") == expected


def test_a_time_budget_is_refused_where_nothing_can_be_cut_short(
    run: Run, llama: Path, settings: list[str], tmp_path: Path
) -> None:
    code, _, err = run("convert", llama, "-o", tmp_path / "out", *settings, "--time-budget", "1h")
    assert code == 2
    assert "Leave --time-budget out" in err
    assert list(tmp_path.iterdir()) == []


def test_too_few_windows_to_distil_are_known_before_the_fit(
    run: Run, llama: Path, settings: list[str], tmp_path: Path
) -> None:
    options = ["--set", "distill.epochs=1", "--set", "distill.samples=2"]
    code, _, err = run("convert", llama, "-o", tmp_path / "out", *settings, *options)
    assert code == 2
    assert "2 windows leave 1 to learn from" in err
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_is_not_overwritten(run: Run, ternary: Path, llama: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    gguf = folder / "model.gguf"
    own = Path(shutil.copy(text, folder / "text.txt"))
    gguf.write_bytes(b"GGUF")  # looked at only once it is known to be safe
    for command in (
        ["convert", gguf, "-o", folder, "-r", "fast", "--text", text],
        ["convert", llama, "-o", folder, "-r", "fast", "--text", f"{own}@2"],
        ["distill", ternary, "--teacher", llama, "-o", folder, "--text", own],
    ):
        code, _, err = run(*command, "--force")
        assert code == 2
        assert "is read and would be lost" in err
    assert sorted(path.name for path in folder.iterdir()) == ["model.gguf", "text.txt"]


def test_distill_takes_no_setting_of_what_is_done(run: Run, ternary: Path, llama: Path, tmp_path: Path) -> None:
    command = ["distill", ternary, "--teacher", llama, "-o", tmp_path / "out", "--set", "group_size=64"]
    code, _, err = run(*command)
    assert code == 2
    assert "'group_size=64' would change how" in err
    assert list(tmp_path.iterdir()) == []


def test_inspect_refuses_options_that_would_count_for_nothing(run: Run, ternary: Path, tmp_path: Path) -> None:
    for options in (["--teacher", "x", "--plot", tmp_path / "a.png"], ["--text", "pydoc"], ["--plot", tmp_path / "a"]):
        code, out, err = run("inspect", ternary, *options)
        assert (code, out) == (2, "")
        assert "error" in err.lower()
    assert list(tmp_path.iterdir()) == []


def test_generate_with_a_temperature_follows_the_seed(run: Run, ternary: Path) -> None:
    def sample(seed: int) -> str:
        code, out, _ = run("generate", ternary, "abc", "-n", 30, "--temperature", 1, "--seed", seed)
        assert code == 0
        return out

    assert sample(1) == sample(1) != sample(2)


def test_generate_puts_the_prompt_into_the_chat_template(run: Run, ternary: Path) -> None:
    model, tokenizer = ternarize.load(ternary)
    ids = tokenizer("user abc ", return_tensors="pt")["input_ids"]
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[
        0, ids.shape[1] :
    ]
    expected = tokenizer.decode(new, skip_special_tokens=True)
    assert run("generate", ternary, "abc", "-n", 12, "--chat") == (0, f"{expected}\n", "")


def test_inspect_lists_every_linear_and_what_stayed_float(run: Run, ternary: Path) -> None:
    code, out, err = run("inspect", ternary)
    assert (code, err) == (0, "")
    for entry in Report.read(ternary).linears:
        shape = f"{entry.shape[0]} x {entry.shape[1]}"
        assert re.search(
            rf"{entry.name} +{shape} +{entry.error:.4f} +{100 * entry.zero_share:.1f}% +{entry.bits:.3f}", out
        )
    assert "model.layers.*.input_layernorm.weight (2): one value per feature (norm or bias)" in out


def test_inspect_shows_the_worst_first(run: Run, ternary: Path) -> None:
    entries = sorted(Report.read(ternary).linears, key=lambda entry: -entry.error)
    code, out, _ = run("inspect", ternary, "--worst", 3)
    assert code == 0
    assert re.findall(r"^model\.layers\.\d\.(?:mlp|self_attn)\.\w+(?= )", out, re.M) == [e.name for e in entries[:3]]


def test_json_of_inspect_is_the_report(run: Run, ternary: Path) -> None:
    code, out, _ = run("inspect", ternary, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((ternary / "report.json").read_text())


def test_a_plot_is_drawn_though_nobody_reads_the_table(ternary: Path, tmp_path: Path) -> None:
    """As in `ternarize inspect ... --plot FILE | head`."""
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.png"
    command = [sys.executable, "-m", "ternarize.cli", "inspect", str(ternary), "--plot", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert file.stat().st_size
    assert "Traceback" not in errors


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_inspect_draws(suffix: str, magic: bytes, run: Run, ternary: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plot.{suffix}"
    code, out, _ = run("inspect", ternary, "--plot", file)
    assert code == 0
    assert out.endswith(f"Drawn into {file}\n")
    assert file.read_bytes().startswith(magic)


def test_evaluate_measures_beside_the_teacher_and_keeps_the_result(
    run: Run, ternary: Path, llama: Path, text: Path, tmp_path: Path
) -> None:
    folder = copy_folder(ternary, tmp_path / "copy")
    records = tmp_path / "records.jsonl"
    records.write_text("\n".join(json.dumps({"text": line}) for line in text.read_text().split("\n") if line))
    options = ["--teacher", llama, "--text", text, "--text", records, "--length", 32, "--windows", 4]
    code, out, _ = run("evaluate", folder, *options, "--json")
    assert code == 0
    plain, lines = json.loads(out)
    assert (plain["text"], lines["text"]) == ("text.txt", "records.jsonl")
    assert {row["windows"] for row in (plain, lines)} == {4}
    assert plain["kl"] > 0
    assert 0 <= plain["agreement"] < 1
    assert plain["perplexity"] != plain["teacher_perplexity"]
    assert Report.read(folder).run["evaluation"] == [plain, lines]
    code, out, _ = run("evaluate", folder, *options)
    assert code == 0
    for row in (plain, lines):
        assert row["text"] in out
        numbers = re.findall(r"\d+\.\d+", out)
        for name in ("perplexity", "teacher_perplexity", "kl"):
            assert any(abs(float(number) - row[name]) <= 0.001 * row[name] + 0.0005 for number in numbers), name
        assert f"{100 * row['agreement']:.1f} %" in out


def test_evaluate_without_saving_changes_nothing(run: Run, ternary: Path, text: Path) -> None:
    before = contents(ternary), (ternary / "report.json").read_bytes()
    code, out, _ = run("evaluate", ternary, "--text", text, "--length", 32, "--windows", 0, "--no-save", "--json")
    assert code == 0
    (result,) = json.loads(out)
    assert result["windows"] == len(text.read_text()) // 32
    assert result["kl"] is None
    assert (contents(ternary), (ternary / "report.json").read_bytes()) == before


def test_evaluate_measures_float_activations_unless_told_otherwise(
    run: Run, ternary: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native_paths():
        pytest.skip("no native library was built")
    monkeypatch.setenv("TERNARIZE_ACTIVATIONS", "int8")
    found = {}
    for wanted in ([], ["--activations", "float"], ["--activations", "int8"]):
        code, out, _ = run("evaluate", ternary, "--text", text, "--length", 32, "--no-save", "--json", *wanted)
        assert code == 0
        found[" ".join(wanted)] = json.loads(out)[0]["perplexity"]
    plain, exact, rounded = found.values()
    assert plain == exact != rounded
    assert rounded == pytest.approx(exact, rel=0.02)
    code, _, err = run("evaluate", ternary, "--text", text, "--activations", "int4")
    assert code == 2
    assert "'int4' is not one of int8, float" in err


def test_json_stays_json_where_the_perplexity_is_infinite(run: Run, llama: Path, tmp_path: Path) -> None:
    folder = edit_tensors(copy_folder(llama, tmp_path / "copy"), lambda t: t["lm_head.weight"].mul_(1e6))
    text = make_text(tmp_path / "text.txt", 100)
    code, out, _ = run("evaluate", folder, "--text", text, "--length", 32, "--json")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    assert code == 0
    json.loads(out, parse_constant=refuse)


# -- budgets, ranking, distillation, the gate --------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("20", 20)])
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("option", ["--time-budget", "--target-size"])
@pytest.mark.parametrize("value", ["soon", "-3", "0", "5 parsecs", ""])
def test_a_budget_that_is_none_is_refused(
    run: Run, llama: Path, settings: list[str], tmp_path: Path, option: str, value: str
) -> None:
    code, out, err = run("convert", llama, "-o", tmp_path / "out", *settings, f"{option}={value}")
    assert (code, out) == (2, "")
    assert repr(value) in err


def test_a_target_size_is_met(run: Run, llama: Path, ternary: Path, settings: list[str], tmp_path: Path) -> None:
    usual = (ternary / "model.safetensors").stat().st_size
    code, _, err = run("convert", llama, "-o", tmp_path / "out", *settings, "--target-size", str(usual + 2500))
    assert code in (0, printing.COLLAPSED), err
    assert usual - 2000 < (tmp_path / "out" / "model.safetensors").stat().st_size <= usual + 2500
    code, _, err = run("convert", llama, "-o", tmp_path / "small", *settings, "--target-size", "1kB")
    assert code == 2
    assert "bits for each ternary weight" in err


def test_inspect_ranks_linears_against_the_teacher(run: Run, llama: Path, ternary: Path, text: Path) -> None:
    code, out, err = run("inspect", ternary, "--teacher", llama, "--text", text, "--worst", 3)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()[1:]]
    assert len(rows) == 3
    figures = [float(kl) for _, kl in rows]
    assert figures == sorted(figures, reverse=True)
    assert figures[0] > 0
    code, out, _ = run("inspect", ternary, "--teacher", llama, "--text", text, "--json")
    assert code == 0
    assert len(json.loads(out)) == 14


def test_a_collapsed_model_ends_with_its_own_exit_code(
    run: Run, llama: Path, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ternarize.gate.COLLAPSED_KL", 1e-3)
    code, out, err = run("convert", llama, "-o", tmp_path / "out", *settings)
    assert code == 5
    assert "THIS MODEL HAS COLLAPSED" in err
    assert "Next:" not in out
    assert Report.read(tmp_path / "out").run["verdict"]["word"] == "collapsed"


def test_distill_on_the_command_line(run: Run, llama: Path, ternary: Path, tmp_path: Path) -> None:
    options = ["--set", "distill.samples=20", "--set", "distill.check=4", "--time-budget", "5s"]
    code, out, err = run("distill", ternary, "--teacher", llama, "-o", tmp_path / "out", *options)
    assert code in (0, printing.COLLAPSED), err
    assert "held-out KL to the teacher" in out
    code, _, err = run("distill", ternary, "--teacher", llama, "-o", tmp_path / "out", *options)
    assert code == 2
    assert "not empty" in err


# -- export, verify, import -------------------------------------------------------------------------------------------


def test_export_and_verify_from_the_command_line(run: Run, ternary: Path, text: Path, tmp_path: Path) -> None:
    folder = copy_folder(ternary, tmp_path / "student")
    code, out, err = run("export", folder, "--to", "dense")
    assert code == 0
    assert "16.000" in out
    assert "dense: exact" in err
    code, out, _ = run("verify", folder, "--text", text, "--json")
    assert code == 0
    (found,) = json.loads(out)
    assert found["format"] == "dense"
    assert found["ok"]
    edit_tensors(tmp_path / "student-dense", lambda tensors: tensors["model.norm.weight"].zero_())
    code, out, err = run("verify", folder, "--text", text)
    assert code == 2
    assert "DIFFERS" in out
    assert "written as exact" in err
    assert run("export", folder, "--to", "dense")[0] == 2
    assert "Formats: dense" in run("export", folder, "--to", "fortran")[2]


def test_import_from_the_command_line(run: Run, ternary: Path, llama: Path, tmp_path: Path) -> None:
    code, _, err = run("import", llama, "--output", tmp_path / "out")
    assert code == 2
    assert "is not ternary" in err
    ternarize.load(ternary)[0].dequantize().save_pretrained(tmp_path / "floats")
    make_tokenizer().save_pretrained(tmp_path / "floats")
    code, out, _ = run("import", tmp_path / "floats", "--output", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["linears"] == 14
