"""What the README says is what happens: every block of code runs, every name is there.

A fenced block is run as it stands. A comment in front of it may say more:

- ``<!-- file: NAME -->`` saves it as a file, for the commands that follow;
- ``<!-- continues: NAME -->`` adds it to that file, run once more with all its continuations;
- ``<!-- not run: REASON -->`` stands for set-up commands alone, which are compared with pyproject
  and Makefile instead.
"""

from __future__ import annotations

import doctest
import importlib.util
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import hfpp
from tests.commands import ROOT, CommandError, run_command

pytestmark = pytest.mark.torch

README = (ROOT / "README.md").read_text(encoding="utf-8")
_BLOCK = re.compile(
    r"(?:^<!-- (?P<directive>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
_LANGUAGES = {"python", "bash", "json", "pycon"}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block."""

    language: str
    code: str
    verb: str  # "", "file", "continues" or "not run"
    name: str


def find_blocks(text: str) -> list[Block]:
    blocks = []
    for match in _BLOCK.finditer(text):
        verb, _, name = (match["directive"] or "").partition(": ")
        blocks.append(Block(match["language"], match["code"], verb, name))
    return blocks


BLOCKS = find_blocks(README)
FILES = {block.name: block.code for block in BLOCKS if block.verb == "file"}


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_block_is_left_out() -> None:
    assert len(BLOCKS) == README.count("\n```") / 2
    assert {block.language for block in BLOCKS} == _LANGUAGES
    assert {block.verb for block in BLOCKS} == {"", "file", "continues", "not run"}
    assert all(block.language == "bash" for block in BLOCKS if block.verb == "not run")
    assert all(block.name in FILES for block in BLOCKS if block.verb == "continues")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("readme")
    for name, code in FILES.items():
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text(code, encoding="utf-8")
    return made


@pytest.mark.parametrize(
    "command", [b.code for b in BLOCKS if b.language == "bash" and b.verb == ""]
)
def test_commands(command: str, folder: Path) -> None:
    before = set(folder.iterdir())
    output = run_command(command, folder)
    if "train.py" in command:
        losses = [float(number) for number in re.findall(r"loss (\S+)", output)]
        assert len(losses) == 10
        assert losses[-1] < losses[0]
    elif command.startswith("hfpp check"):
        assert output.startswith("Gemma2ForCausalLM: exact\n")
        assert re.findall(r"^(\d) stages: exact$", output, re.M) == ["2", "4"]
    elif command.startswith("hfpp plan"):
        made = {path.name for path in set(folder.iterdir()) - before}
        assert made == {"plan.json", "plan.html", "schedule.csv"}
        assert "405.9B parameters, 126 layers, on 10240 x H100" in output
        assert re.search(r"^F forward", output, re.M)  # of the picture
    else:
        (made,) = set(folder.iterdir()) - before
        results = {"loss.png", "metrics.jsonl", "schedule.svg", "summary.json"}
        if "--trace" in command:
            results |= {"trace.json", "trace.svg"}
            assert "rank 1" in output
        assert results <= {path.name for path in made.iterdir()}


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".py")])
def test_continued_scripts(name: str, tmp_path: Path) -> None:
    parts = [block.code for block in BLOCKS if block.verb == "continues" and block.name == name]
    shape = "(8, 48, 256) if pipeline.has_last_stage else None"
    reached = f"assert getattr(logits, 'shape', None) == ({shape})\nprint('reached the end')\n"
    (tmp_path / name).write_text("\n".join([FILES[name], *parts, reached]), encoding="utf-8")
    output = run_command(f"torchrun --nproc-per-node 2 {name}", tmp_path)
    assert output.count("reached the end") == 2


@pytest.mark.parametrize(
    "code", [b.code for b in BLOCKS if b.language == "python" and b.verb == ""]
)
def test_scripts(code: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    output = run_command("python script.py", tmp_path)
    if "dualpipev.svg" in code:
        assert output == "(1, 6)\n"
        assert (tmp_path / "dualpipev.svg").read_text(encoding="utf-8").startswith("<svg")
    else:
        assert re.fullmatch(r"0\.\d+ s, \d+\.\d% idle, \d+ activations\n", output)


def test_interactive_blocks() -> None:
    for block in (b for b in BLOCKS if b.language == "pycon"):
        shown = doctest.DocTestParser().get_doctest(block.code, {}, "block", "README.md", 0)
        assert doctest.DocTestRunner().run(shown) == (0, len(shown.examples))


def test_a_command_that_fails_or_hangs_is_seen(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"(?s)exit code 1.*no such thing"):
        run_command("python -c 'raise RuntimeError(\"no such thing\")'; true", tmp_path)
    with pytest.raises(CommandError, match="still running after 1 s"):
        run_command("sleep 60", tmp_path, timeout_s=1)


def test_set_up_is_what_the_project_files_say() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    commands = [
        line.partition("#")[0].split()
        for block in BLOCKS
        if block.verb == "not run"
        for line in block.code.splitlines()
    ]
    others = [command for command in commands if command[0] != "make"]
    named = {target for command in commands if command not in others for target in command[1:]}
    assert others == [["pip", "install", "."]]
    assert named == {"test", "sweep", "lint", "bench", "sanitize", "fuzz", "demo"}
    assert named <= targets
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11,<3.15"
    assert "Python 3.11 to 3.14" in README
    assert {"torch>=2.11", "transformers>=5"} <= set(project["dependencies"])
    assert "torch 2.11 or newer and transformers 5 or newer" in README


def test_the_functions_are_all_there() -> None:
    section = README.partition("## The functions")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, re.M)
    assert sorted(listed) == sorted(hfpp.functional.__all__)


def test_the_architectures_are_as_many_as_the_table_has() -> None:
    table = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    counts = re.findall(r"(\d+) of (\d+) classes are exact", table)
    shown = re.findall(r"(\d+) of (\d+) classes exact", README)
    assert shown == counts
    assert len(counts) == 2


def test_the_picture_is_what_the_code_draws() -> None:
    drawing = _load(ROOT / "docs" / "draw_schedule.py")
    assert drawing.PICTURE.read_text(encoding="utf-8") == drawing.draw()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (ROOT / link).exists()] == []


@pytest.mark.parametrize(
    ("row", "file", "pattern"),
    [
        (
            "one of 4 stages",
            "split",
            r"anatomy and one stage\s+\| under 1 s of CPU time\s+\| (\d+) ms",
        ),
        ("hollow layers of 24", "forward", r"18 hollow, .*\| (\d\.\d+) \("),
        ("boundary shapes", "core", r"10,000 stages\s+\| ([\d.]+) us"),
        ("`import hfpp`", "core", r"import hfpp\s+\| under 100 ms.*\| ([\d.]+) ms"),
    ],
)
def test_measured_facts_are_those_of_the_benchmarks(row: str, file: str, pattern: str) -> None:
    """To the digits that the README gives."""
    line = next(line for line in README.splitlines() if line.startswith("| ") and row in line)
    text = (ROOT / "bench" / "results" / f"{file}.md").read_text()
    measured = float(re.findall(pattern, text)[0])
    shown, unit = re.findall(r"\| ([\d.]+) (s|times|µs)", line)[0]
    in_unit = measured / 1000 if unit == "s" else measured
    digits = len(shown.partition(".")[2])
    assert float(shown) == round(in_unit, digits), (line, measured)
