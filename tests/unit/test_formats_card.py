"""The model card says what it was told, whatever is in the names: as YAML, as Python and as Markdown."""

import ast

import pytest
import yaml
from markdown_it import MarkdownIt

from qpalette.core.records import LinearRecord
from qpalette.formats import Tuned, base_model_of, model_card

HOSTILE = [
    'a"; import os; os.system("x") #',
    "a\\",
    "tiny_llama_*bold*_[link](http://x)",
    "<script>alert(1)</script>",
    "`code` ``more``",
    "$x$ & ~~y~~ | # z",
    "\N{GRINNING FACE} \u65e5\u672c",
]
BROKEN = ["a\n---\nlicense: other\n```\n# Title", "bell\x07 \u2028 line", "half \udc80 a character"]


def card(name: str, **config: str) -> str:
    records = {f"model.layers.0.{name}": LinearRecord("nuq-3", 32, 32, "h32", 0)}
    distortions = dict.fromkeys(records, 0.03)
    return model_card(name, {"model_type": name, **config}, records, distortions, 1000, config.get("base"))


def parts(text: str) -> tuple[dict, ast.Module, list]:
    """(front matter, the code that is shown, Markdown tokens)."""
    _, front, body = text.split("---\n", 2)
    code = body.split("```python\n")[1].split("\n```")[0]
    return yaml.safe_load(front), ast.parse(code), MarkdownIt("commonmark").enable("table").parse(body)


def shown(token) -> str:
    return "".join(child.content for child in token.children)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_shown_as_they_are(name):
    front, code, tokens = parts(card(name, license=name, base=name))
    assert front["license"] == front["base_model"] == name
    assert set(front) == {"library_name", "tags", "license", "base_model", "base_model_relation"}
    calls = [node for node in ast.walk(code) if isinstance(node, ast.Call)]
    assert [ast.literal_eval(call.args[0]) for call in calls] == [name, name]
    assert shown(tokens[1]) == name
    cells = [shown(tokens[i + 1]) for i, token in enumerate(tokens) if token.type == "td_open"]
    assert cells[-5].endswith(name.rpartition(".")[2]), "the kind of linear, in one cell"
    assert not [token for token in tokens if token.type.startswith("html")]


def test_no_name_makes_a_longer_card_than_is_counted_with():
    """`disk_bytes` promises the size before the directory has a name: of backslashes, as it assumes."""
    records = {"a": LinearRecord("nuq-3", 32, 32, "h32", 0)}

    def size(character: str) -> int:
        title = character * (255 // len(character.encode("utf-8", "surrogateescape")))
        return len(model_card(title, {}, records, {"a": 0.03}, 1000).encode())

    longest = size("\\")
    assert all(size(chr(code)) <= longest for code in [*range(1, 0x2100), 0xDC80, 0xFFFD, 0x1F600])


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_printed_breaks_nothing(name):
    text = card(name, license=name, base=name)
    text.encode()
    front, code, tokens = parts(text)
    assert set(front) == {"library_name", "tags", "license", "base_model", "base_model_relation"}
    assert front["license"].isprintable()
    assert len([node for node in ast.walk(code) if isinstance(node, ast.Call)]) == 2
    headings = [shown(tokens[i + 1]) for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[1:] == ["WARNING: import qpalette first", "Size", "Distortion"]


@pytest.mark.parametrize("name", ["owner/name", "o.w-n_er/na.me"])
def test_the_base_model_is_read_again(name):
    assert base_model_of(card("tiny", base=name)) == name


@pytest.mark.parametrize("name", [*HOSTILE, *BROKEN])
def test_what_is_no_hub_name_is_not(name):
    assert base_model_of(card("tiny", base=name)) is None
    assert base_model_of(name) is None


def test_tuning_is_told():
    tuned = Tuned(12, 40960, 4096, "0" * 64, 1.35, 0.85)
    text = model_card("x", {}, {"a": LinearRecord("nuq-3", 32, 32, "h32", 0)}, {"a": 0.03}, 0, tuned=tuned)
    assert "12 steps on 40,960 tokens" in text
    assert "from 1.3500 to 0.8500 nats" in text
