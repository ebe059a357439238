"""The page of `plan --report`: its slider shows what the planner says, in a real browser; nothing is fetched."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from test_cli import _plain_output, model, run, save_model, text  # noqa: F401

from qpalette.core.errors import InputError
from qpalette.core.records import LinearShape
from qpalette.pipeline.planning import even_sensitivities, make_plan
from qpalette.plan import Budget, LatencyProfile, SensitiveLinear, Sensitivities, Space, palette_of
from qpalette.report.plan_page import plan_page, read_peers
from qpalette.storage import open_checkpoint

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
TRY = """<script>
const text = id => byId(id).textContent, found = { requests: performance.getEntriesByType("resource").length };
const look = () => ({ bits: text("bits"), figures: text("figures"), layers: text("layers"), kinds: text("kinds"),
  parts: text("parts"), at: byId("marker").getAttribute("cx"),
  cells: document.querySelectorAll("#layers .cell[style]").length });
found.here = look();
found.each = data.plans.map((plan, index) => {
  slider.value = index; slider.dispatchEvent(new Event("input")); return look(); });
byId("back").click(); found.back = look();
found.peers = document.querySelectorAll(".peer").length;
fetch("http://127.0.0.1:PORT/asked").catch(() => 0).finally(() => {
  document.body.replaceChildren(make("output", {}, JSON.stringify(found))); });
</script></body>"""


def sensitivities(experts=0):
    shapes = [
        (f"model.layers.{i}.mlp.{name}", 128, 64, 3.0 ** (i + j)) for i in range(3) for j, name in enumerate(("a", "b"))
    ]
    shapes += [(f"model.layers.0.mlp.experts.{i}.up_proj", 64, 64, 1.0 + i) for i in range(experts)]
    return Sensitivities(
        tuple(SensitiveLinear(LinearShape(n, *s), n, a) for n, *s, a in shapes), {"source": "</script>"}
    )


def planned(count=0, **space):
    return make_plan(sensitivities(count), Budget(Fraction(3)), Space(palette_of("fast"), **space))


def test_plans_of_other_sizes_are_told_by_the_curve():
    """As if each had been made by itself."""
    known = replace(sensitivities(), curve=((0.1, 0.12), (1.0, 1.5), (10.0, 30.0)))
    budgets = [Budget(Fraction(rate)) for rate in (2, 3, 4)]
    made = [make_plan(known, budget, Space(palette_of("fast"))) for budget in budgets]
    data = data_of(plan_page(made[1], "3 bits", "qpalette plan", "model"))
    here = data["plans"][data["here"]]
    assert here["loss"] == pytest.approx(made[1].planned.choice.loss)
    assert here["scale"] == pytest.approx(1)
    for found in made:
        own, loss = found.planned.choice.loss, found.planned.choice.loss / found.factor * made[1].factor
        assert made[1].scale(loss) * loss == pytest.approx(own)
        assert made[1].scale(loss) != pytest.approx(1) or found is made[1]


def data_of(page):
    return json.loads(DATA.search(page)[1])


def test_experts_with_codes_of_their_own_are_units_of_their_own():
    data = data_of(plan_page(planned(4, experts="free"), "3 bits", "qpalette plan", "model"))
    assert len(data["units"]) > 7
    assert sum(unit["times"] for unit in data["units"]) == 10


@pytest.mark.parametrize("experts", [0, 4])
def test_each_plan_of_the_page_is_what_the_planner_counts(experts):
    found = planned(experts, experts="shared")
    data = data_of(plan_page(found, "3 bits", "qpalette plan", "model"))
    front = {point.bits: point for point in found.planner.front(64)}
    assert len(data["plans"]) > 10
    for plan in data["plans"]:
        codes = [ord(letter) - data["first"] for letter in plan["codes"]]
        paid = [
            (unit["times"] * data["shapes"][unit["shape"]]["bits"][code], unit["sensitivity"] * data["specs"][code][2])
            for unit, code in zip(data["units"], codes, strict=True)
        ]
        assert sum(bits for bits, _ in paid) == plan["bits"]
        assert plan["scale"] * sum(loss for _, loss in paid) == pytest.approx(plan["loss"])
        assert plan["bits"] == found.planned.choice.bits or plan["bound"] == front[plan["bits"]].bound
    assert [plan["loss"] for plan in data["plans"]] == sorted((plan["loss"] for plan in data["plans"]), reverse=True)
    assert data["plans"][data["here"]]["bits"] == found.planned.choice.bits
    assert len(data["units"]) == 6 + (experts > 0), "experts of a layer share their codes"


def test_a_name_does_not_end_the_script():
    name = "</script><script>alert(1)</script>"
    page = plan_page(planned(), "3 bits", f"qpalette plan {name}", name)
    assert page.count("</script>") == 2
    assert data_of(page)["command"].endswith(name)


def test_what_is_no_comparison_is_refused(tmp_path):
    for content in (
        "",
        "[]",
        '{"models": [{"model": "a"}]}',
        '{"models": [{"model": "a", "file_bytes": "x", "kl": 1}]}',
    ):
        (tmp_path / "peers.json").write_text(content)
        with pytest.raises(InputError, match=r"peers\.json"):
            read_peers(tmp_path / "peers.json")


def test_the_command(run, model, tmp_path):  # noqa: F811
    page, peers, known = tmp_path / "plan.html", tmp_path / "peers.json", tmp_path / "s.json"
    checkpoint = open_checkpoint(model)
    from qpalette.models import find_groups

    groups = find_groups(checkpoint)
    known.write_text(even_sensitivities(groups.all_groups).to_json())
    rows = [{"model": "original", "file_bytes": 9, "kl": None}, {"model": "x/a.gguf", "file_bytes": 300_000, "kl": 0.1}]
    peers.write_text(json.dumps({"models": rows}))
    options = ("plan", model, "--sensitivity", known, "--bits", "3", "--peers", peers)
    assert run(*options).code == 2, "points of a picture that is not asked for"
    made = run(*options, "--report", page)
    assert made.code == 0, made.err
    data = data_of(page.read_text(encoding="utf-8"))
    assert data["peers"] == [{"name": "a.gguf", "bytes": 300_000, "kl": 0.1}]
    assert [name for name, _ in data["carried"]][:-1] == [f"{group.name}, as it is" for group in groups.optional]
    assert sum(nbytes for _, nbytes in data["carried"]) == data["rest"] > 0
    assert run(*options, "--report", page, *(x for group in groups.optional for x in ("--also", group.name))).code == 0
    packed = data_of(page.read_text(encoding="utf-8"))
    assert len(packed["carried"]) == 1
    assert {group.name for group in groups.optional} <= {unit["name"] for unit in packed["units"]}


class Counted(BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self):
        self.asked.append(self.path)
        self.send_response(200)
        self.send_header("Access-Control-Allow-Origin", "*")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def opened(tmp_path):
    """What the page is in a browser, at a width; and what was asked of a server by a script in it that tries."""
    if BROWSER is None:
        pytest.skip("there is no Chromium here")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Counted)
    Counted.asked = []
    Thread(target=server.serve_forever, daemon=True).start()

    def look(page, width):
        file = tmp_path / "page.html"
        file.write_text(page.replace("</body>", TRY.replace("PORT", str(server.server_port))), encoding="utf-8")
        quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
        command = [BROWSER, *quiet, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
        command += ["--virtual-time-budget=5000", "--dump-dom", file.as_uri()]
        shown = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=True
        ).stdout
        found = re.search(r"<output>(.*?)</output>", shown, re.DOTALL)
        assert found, shown[-2000:]
        return json.loads(html.unescape(found[1]))

    yield look
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("width", [1000, 390])
def test_in_a_browser_the_slider_changes_plan_and_figures(opened, width):
    found = planned()
    data = data_of(page := plan_page(found, "3 bits", "qpalette plan", "model"))
    seen = opened(page, width)
    assert seen["here"] == seen["each"][data["here"]] == seen["back"]
    for key in ("bits", "figures", "layers", "kinds", "at"):
        assert len({look[key] for look in seen["each"]}) >= len(data["plans"]) - 1, key
    for look, plan in zip(seen["each"], data["plans"], strict=True):
        assert look["bits"].startswith(f"{plan['bits'] / data['weights']:.3f} bits")
        assert look["cells"] == 6
    assert Counted.asked == []
    assert seen["requests"] == 0


def test_in_a_browser_with_a_model_peers_and_a_profile(opened, model):  # noqa: F811
    from qpalette.models import find_groups

    checkpoint = open_checkpoint(model)
    groups = find_groups(checkpoint)
    shapes = {(x.out_features, x.in_features) for group in groups.groups for x in group.linears}
    palette = [candidate for candidate in palette_of("fast") if candidate.spec.startswith("tcq-")]
    launches = [
        {"segments": [[candidate.spec, *shape]], "batch": 1, "seconds": 1e-6 * float(candidate.rate)}
        for candidate in palette
        for shape in shapes
    ]
    profile = LatencyProfile.from_dict({"profile_version": 1, "constant_seconds": 0, "launches": launches})
    known, space = even_sensitivities(groups.groups), Space(tuple(palette), profile)
    found = make_plan(known, Budget(Fraction(3)), space, checkpoint)
    peers = [{"name": "other", "bytes": found.disk_bytes, "kl": 1.0}]
    seen = opened(plan_page(found, "3 bits", "qpalette plan", str(model), checkpoint, peers), 1000)
    assert seen["peers"] == 1
    assert "as it is" in seen["here"]["parts"]
    assert "µs" in seen["here"]["layers"]
    assert "on disk" in seen["here"]["figures"]
