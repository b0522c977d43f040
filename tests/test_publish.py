"""Pushing: over real HTTP, with the real client, to a small Hub on loopback; what is visible after every failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_server import READER, WRITER, Hub
from huggingface_hub import constants
from tiny import copy_folder, edit_config, edit_tensors, logits

import ternarize
from ternarize.errors import TernarizeError
from ternarize.progress import Progress
from ternarize.publish import check_access, check_name, prepare, publish
from ternarize.quantizer import check_folder

QUIET = Progress(quiet=True)
Run = Callable[..., tuple[int, str, str]]
REPO = "me/tiny-ternary"
WEIGHTS = "model.safetensors"


def push(
    folder: Path, repo: str = REPO, force: bool = False, private: bool = False, revision: str | None = None
) -> str:
    return publish(prepare(folder, repo, private, revision), QUIET, force)


def sent(hub: Hub) -> list[str]:
    return [path for method, path in hub.requests if method == "PUT"]


# -- what arrives -----------------------------------------------------------------------------------------------------


def test_pushed_model_comes_back_with_from_pretrained(ternary: Path, hub: Hub, tmp_path: Path) -> None:
    code = f"""
import sys, torch, ternarize
from transformers import AutoModelForCausalLM, AutoTokenizer
from ternarize import cli
sys.argv = ["ternarize", "push", {str(ternary)!r}, {REPO!r}, "--private"]
try:
    cli.run()
except SystemExit as end:
    assert not end.code
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tiny import logits
model = AutoModelForCausalLM.from_pretrained({REPO!r})
again, tokenizer = ternarize.load({REPO!r})
assert tokenizer("abc")["input_ids"] == AutoTokenizer.from_pretrained({str(ternary)!r})("abc")["input_ids"]
assert torch.equal(logits(model), logits(again))
torch.save(logits(model), {str(tmp_path / "logits.pt")!r})
"""
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITER}
    environment = os.environ | settings | {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"Pushed: {hub.url}/{REPO}/commit/" in done.stdout
    assert hub.repos[REPO].private
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(ternarize.load(ternary)[0]))


def test_pushed_model_is_refused_without_the_package(ternary: Path, hub: Hub, tmp_path: Path) -> None:
    """As the card says: of a repository transformers does not name the file that it misses, as it does of a folder."""
    push(ternary)
    code = f"from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained({REPO!r})"
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITER}
    environment = os.environ | settings | {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1
    assert "Unknown quantization type, got ternarize" in done.stderr
    assert f"{REPO} does not appear to have a file named" in done.stderr
    card = hub.repos[REPO].files()["README.md"].decode()
    assert "does not know the quantization type\n`ternarize`, then finds no weights" in card


def test_all_files_become_visible_in_one_commit(ternary: Path, hub: Hub) -> None:
    address = push(ternary)
    repo = hub.repos[REPO]
    assert len(repo.commits) == 2  # the Hub's own first one, and ours
    assert address == f"{hub.url}/{REPO}/commit/{repo.branches['main']}"
    files = repo.files()
    assert set(files) == {path.name for path in ternary.iterdir()} | {".gitattributes"}
    for path in ternary.iterdir():
        if path.name != "README.md":
            assert files[path.name] == path.read_bytes()
    card = files["README.md"].decode()
    assert f'ternarize.load("{REPO}")' in card
    assert "PATH_OR_REPO" not in card
    assert "PATH_OR_REPO" in (ternary / "README.md").read_text()
    assert not repo.private


def test_second_push_sends_nothing_and_makes_no_commit(ternary: Path, hub: Hub) -> None:
    assert push(ternary) == push(ternary)
    assert len(sent(hub)) == 1
    assert len(hub.repos[REPO].commits) == 2


def test_revision_is_a_branch_and_main_stays_as_it_is(ternary: Path, hub: Hub) -> None:
    push(ternary, revision="dev")
    repo = hub.repos[REPO]
    assert WEIGHTS in repo.files("dev")
    assert set(repo.files("main")) == {".gitattributes"}


def test_weights_of_an_earlier_push_do_not_stay_beside_the_new_ones(ternary: Path, hub: Hub) -> None:
    old = {"report.json": b"{}", "model-00001-of-00002.safetensors": b"a", "model.safetensors.index.json": b"{}"}
    hub.create(REPO, **old, **{"notes.txt": b"mine"})
    push(ternary)
    files = hub.repos[REPO].files()
    assert not {"model-00001-of-00002.safetensors", "model.safetensors.index.json"} & set(files)
    assert files["notes.txt"] == b"mine"


def test_hidden_files_stay_at_home(ternary: Path, tmp_path: Path) -> None:
    folder = copy_folder(ternary, tmp_path / "copy")
    (folder / ".env").write_text("HF_TOKEN=secret")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    assert set(prepare(folder, REPO).sizes) == {path.name for path in ternary.iterdir()}


def test_export_is_pushed_beside_the_model_and_only_where_it_is_whole(ternary: Path, hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(b"GGUF" + bytes(100))
    (folder / "README.md").write_text("# tiny\n")
    with pytest.raises(TernarizeError, match="neither a folder that ternarize convert wrote"):
        push(folder)
    (folder / "export.json").write_text("{}")
    push(ternary)
    push(folder)
    assert {WEIGHTS, "tiny.gguf", "export.json"} <= set(hub.repos[REPO].files())
    (folder / "tiny.gguf").write_bytes(bytes(100))
    with pytest.raises(TernarizeError, match="does not begin as a GGUF file does"):
        push(folder)


# -- what goes wrong on the way ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [500, "hang up"])
@pytest.mark.parametrize("place", ["/lfs/", "/objects/batch", "/preupload/", "/commit/main"])
def test_failure_leaves_nothing_visible_and_the_next_push_goes_on(
    trouble: int | str, place: str, ternary: Path, hub: Hub
) -> None:
    hub.trouble = lambda method, path: trouble if place in path else None
    with pytest.raises(TernarizeError, match="run the same command again"):
        push(ternary)
    assert set(hub.repos[REPO].files()) == {".gitattributes"}
    hub.trouble = lambda method, path: None
    arrived = set(hub.large)
    hub.requests.clear()
    push(ternary)
    assert WEIGHTS in hub.repos[REPO].files()
    assert len(sent(hub)) == (0 if arrived else 1)
    assert bool(arrived) == (place == "/commit/main")


def test_lost_answer_to_the_commit_is_told_and_mended_by_the_next_push(ternary: Path, hub: Hub) -> None:
    hub.trouble = lambda method, path: "lose the answer" if "/commit/" in path else None
    with pytest.raises(TernarizeError, match="Whether the commit arrived is not known"):
        push(ternary)
    hub.trouble = lambda method, path: None
    push(ternary)
    assert len(hub.repos[REPO].commits) == 2


def test_file_that_the_repository_leaves_out_is_noticed(ternary: Path, hub: Hub) -> None:
    hub.ignored = WEIGHTS
    with pytest.raises(TernarizeError, match=r"1 of \d+ files are not there as they are here: model.safetensors"):
        push(ternary)


def test_a_card_that_the_hub_refuses_is_said_before_anything_is_sent(ternary: Path, hub: Hub) -> None:
    hub.faults = ['"license" must be one of [apache-2.0, mit]', '"language" must be a string']
    with pytest.raises(
        TernarizeError, match=r"refuses .*README\.md.*\"license\" must be one .*; \"language\".*Nothing was"
    ):
        push(ternary)
    assert not hub.repos
    assert not sent(hub)


def test_private_is_not_kept_by_a_public_repository(ternary: Path, hub: Hub) -> None:
    hub.create(REPO)
    with pytest.raises(TernarizeError, match="exists and is public"):
        push(ternary, private=True)
    assert not sent(hub)


def test_somebody_elses_files_are_kept_unless_forced(ternary: Path, hub: Hub) -> None:
    hub.create(REPO, **{"config.json": b"{}", WEIGHTS: b"float"})
    with pytest.raises(TernarizeError, match=r"holds something that ternarize did not push, such as config\.json"):
        push(ternary)
    with pytest.raises(TernarizeError, match="holds something"):
        push(ternary, revision="dev")
    assert hub.repos[REPO].files()[WEIGHTS] == b"float"
    assert set(hub.repos[REPO].branches) == {"main"}
    assert not sent(hub)
    push(ternary, force=True)
    assert hub.repos[REPO].files()[WEIGHTS] == (ternary / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("token", "repo", "trouble", "message"),
    [
        ("", REPO, {}, "there is no Hub token. Run hf auth login"),
        ("hf_wrong", REPO, {}, "does not take the token"),
        (READER, REPO, {}, "may only read"),
        (WRITER, "them/model", {}, "the Hub refuses them/model to this token"),
        (WRITER, REPO, {"whoami": "hang up"}, r"the Hub at http://127\.0\.0\.1:\d+ could not be used"),
        (WRITER, REPO, {"repos/create": 429}, "asks for a pause"),
        (WRITER, REPO, {"repos/create": 503}, "failed with status 503"),
    ],
)
def test_refusals_say_why_and_that_nothing_was_sent(
    token: str,
    repo: str,
    trouble: dict[str, int | str],
    message: str,
    ternary: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    hub.trouble = lambda method, path: next((what for part, what in trouble.items() if part in path), None)
    with pytest.raises(TernarizeError, match=message):
        push(ternary, repo)
    assert not hub.repos


def test_no_server_and_offline_mode_are_told(ternary: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TernarizeError, match="HF_HUB_OFFLINE is set"):
        push(ternary)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TernarizeError, match=r"the Hub at http://127\.0\.0\.1:9 could not be used.*Nothing was sent"):
        push(ternary)


# -- what is not sent at all ------------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "truncated"),
        (lambda folder: (folder / WEIGHTS).unlink(), "neither model.safetensors nor"),
        (lambda folder: edit_tensors(folder, lambda t: t.pop("model.layers.0.mlp.up_proj.weight")), "1 missing"),
        (lambda folder: edit_tensors(folder, lambda t: t.update(more=torch.zeros(1))), "1 unexpected: more"),
        (lambda folder: edit_config(folder, quantization_config=None), "neither a folder that ternarize convert wrote"),
        (lambda folder: edit_config(folder, model_type="nothing"), "transformers cannot build its model"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer"),
        (lambda folder: (folder / "report.json").unlink(), "has no report.json"),
        (lambda folder: (folder / "README.md").unlink(), r"has no README\.md"),
        (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), "its metadata"),
    ],
)
def test_damaged_folder_is_refused_before_anything_is_asked(
    damage: Callable[[Path], object], message: str, ternary: Path, hub: Hub, tmp_path: Path
) -> None:
    folder = copy_folder(ternary, tmp_path / "copy")
    check_folder(folder)
    damage(folder)
    with pytest.raises(TernarizeError, match=message):
        push(folder)
    assert not hub.requests


@pytest.mark.parametrize("name", ["", "model", "a/b/c", "me/", "me/..", "me/a b", "me/-x-", "/tmp/x"])
def test_wrong_names_are_refused(name: str) -> None:
    with pytest.raises(TernarizeError, match="Write it as user/name"):
        check_name(name)


# -- the command line -------------------------------------------------------------------------------------------------


def test_dry_run_shows_everything_and_asks_nobody(ternary: Path, hub: Hub, run: Run) -> None:
    code, out, _ = run("push", ternary, REPO, "--private", "--revision", "dev", "--base", "you/tiny", "--dry-run")
    assert code == 0
    for words in (f"{REPO}, private", "dev", WEIGHTS, "report.json", "base_model: you/tiny", f'load("{REPO}")'):
        assert words in out
    code, out, _ = run("push", ternary, REPO, "--dry-run", "--json")
    shown = json.loads(out)
    assert shown["files"] == {p.name: p.stat().st_size for p in ternary.iterdir()} | {
        "README.md": len(shown["card"].encode())
    }
    assert not hub.requests


def test_push_says_how_to_load_what_was_pushed(ternary: Path, hub: Hub, run: Run, tmp_path: Path) -> None:
    _, out, _ = run("push", ternary, REPO)
    assert f"ternarize.load({REPO!r})" in out
    export = tmp_path / "gguf"
    export.mkdir()
    (export / "tiny.gguf").write_bytes(b"GGUF" + bytes(100))
    (export / "README.md").write_text("# tiny\n")
    (export / "export.json").write_text("{}")
    _, out, _ = run("push", export, f"{REPO}-gguf")
    assert "Pushed: " in out
    assert "ternarize.load" not in out  # which does not read it


def test_convert_pushes_what_it_made(llama: Path, text: Path, hub: Hub, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wanted = ["convert", llama, "-o", out, "--recipe", "fast", "--text", text, "--quiet"]
    for setting in ("group_size=12", "int8_group_size=20", "calibration.samples=16", "calibration.length=64"):
        wanted += ["--set", setting]
    assert run(*wanted, "--private")[0] == 2
    code, _, err = run(*wanted, "--push", "them/model")
    assert code == 2
    assert "the Hub token belongs to me" in err
    assert not out.exists()  # told before the work, not after it
    hub.trouble = lambda method, path: 500 if "/commit/" in path else None
    code, _, err = run(*wanted, "--push", REPO, "--private")
    assert code == 2
    assert f"The converted folder is complete; to push it: ternarize push {out} {REPO} --private" in err
    hub.trouble = lambda method, path: None
    code, shown, err = run(*wanted, "--force", "--push", REPO, "--private", "--json")
    assert code == 0, err
    assert hub.repos[REPO].private
    card = hub.repos[REPO].files()["README.md"].decode()
    assert json.loads(shown)["run"]["commands"][0] in card
    assert f"--push {REPO} --private --json" in card


@pytest.mark.parametrize("token", ["", READER])
def test_a_gated_base_is_refused_with_what_to_do(
    token: str, llama: Path, hub: Hub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    hub.create("them/gated", **{path.name: path.read_bytes() for path in llama.iterdir()}).gated = True
    for command in (["plan", "them/gated"], ["convert", "them/gated", "-o", tmp_path / "out"]):
        code, _, err = run(*command)
        assert code == 2
        assert "them/gated is gated: accept its terms on the Hub, then run hf auth login" in err
    assert not list(tmp_path.glob("out*"))


def test_access_is_that_of_the_user_and_the_organisations(hub: Hub) -> None:
    check_access("me/x")
    check_access("us/x")
    with pytest.raises(TernarizeError, match="to those of me, us"):
        check_access("them/x")
