"""`hfpp check`: where models come from, exit codes, one line for what the user got wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hfpp import cli
from tests.models import config_of

NO_SPLIT = "tests.runtime.test_split_model:Twice"
OWN_CODE = """
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

class OwnConfig(PretrainedConfig):
    model_type = "own"
    def __init__(self, width=64, depth=6, vocab_size=300, **kwargs):
        self.width, self.depth, self.vocab_size = width, depth, vocab_size
        super().__init__(**kwargs)

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        width, depth = config.width, config.depth
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(config.width, config.vocab_size)
        self.post_init()
    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x.tanh())
        return self.out(x)
"""


def check(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = cli.main(["check", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    config = config_of("llama", num_hidden_layers=10)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_and_its_config(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = check(capsys, llama, "--pp", 2)
    assert (code, err) == (0, "")
    assert out.startswith("LlamaForCausalLM: exact\n")
    assert "a small model of the same kind of 4 layers" in out
    assert "before layer 5 crosses: hidden state [2 x 21 x 32] float32" in out
    code, out, _ = check(capsys, llama / "config.json", "--pp", "2,3", "--full", "--json")
    values = json.loads(out)
    assert code == 0
    assert values["result"] == "exact"
    assert (values["is_shrunk"], values["num_layers"]) == (False, 10)
    assert [size["pp_size"] for size in values["sizes"]] == [2, 3]


def test_a_functions_model_and_its_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = check(capsys, "tests.models:PlainModel", "--pp", 2, "--tokens", 12)
    assert code == 0
    assert "memory of layer 2 [2 x 12 x 1] float32" in out
    code, out, _ = check(capsys, NO_SPLIT, "--pp", 2)
    assert code == 3
    assert "2 stages: refused\n  Twice cannot be split" in out


def test_a_failure_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = check(capsys, "tests.check.test_report:Broken", "--pp", 2)
    assert code == 1
    assert "Broken: failed" in out


def test_a_folder_with_code_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own_model.py").write_text(OWN_CODE)
    config = {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {
            "AutoConfig": "own_model.OwnConfig",
            "AutoModelForCausalLM": "own_model.OwnModel",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, err = check(capsys, tmp_path, "--pp", 2)
    assert (code, out) == (2, "")
    assert "has code of its own (auto_map)" in err
    assert "--trust-remote-code" in err
    code, out, _ = check(capsys, tmp_path, "--pp", 2, "--trust-remote-code")
    assert code == 0
    assert out.startswith("OwnModel: exact\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "'/nowhere' has no readable config.json"),
        (["tests.models:Missing"], "'tests.models:Missing' gives no model: AttributeError"),
        (["tests.models:Block"], "'tests.models:Block' gives no model: TypeError"),
        (["no_such_module:f"], "'no_such_module:f' gives no model: ModuleNotFoundError"),
        (["builtins:dict"], "'builtins:dict' returned a dict: it must return an nn.Module"),
        (["tests.models:PlainModel", "--pp", "0"], "pp_sizes ((0,)) must be positive"),
        (["tests.models:PlainModel", "--tokens", "2"], "tokens (2) must be a number of at least 8"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = check(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"hfpp check: error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json, line 1, column 2: not JSON"),
        ("{}", "names no model_type"),
        ('{"model_type": "nobody_knows"}', "transformers makes no config"),
    ],
)
def test_a_config_that_is_none(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(text)
    code, _, err = check(capsys, tmp_path)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_help_documents_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["check", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("0 every size is exact", "1 some size differs", "2 wrong options", "3 the model"):
        assert part in text
