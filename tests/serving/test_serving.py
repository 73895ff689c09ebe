"""Served answers are the audited ones, counted and limited; what is no good question gets a sentence."""

import base64
import json
import logging
import socket
import struct
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.conftest import RECIPE
from tests.serving.server import answer_of, asked, infer, post, running
from undistill.api import export, protect
from undistill.cli.commands import app
from undistill.core.errors import SpecError, StoreError, VictimError
from undistill.data.views import to_float
from undistill.runs.contact import Contact
from undistill.runs.run import Run
from undistill.runs.settings import Settings
from undistill.serving.app import Server
from undistill.serving.served import Served, of_export, of_run
from undistill.serving.server import serve
from undistill.ship.manifest import Audited
from undistill.victims.protocols import HEADER, png
from undistill.victims.victim import NetworkVictim

pytest.importorskip("onnxscript")
AUDITED = Audited(
    sentence="...", made="2026-01-01", suite="quick-2", best_copy=0.9, queries={"0.1": 4, "0.05": 8}, report_sha256="0"
)


@pytest.fixture(scope="module")
def top(honest: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("served") / "top"
    return protect(honest, "TopK(k=2)", out, settings=Settings(recipe=RECIPE), device="cpu")


@pytest.mark.parametrize("kind", ["run", "export"])
def test_an_audit_of_the_server_sees_the_answers_of_the_run(
    kind: str, sealed: Run, exported: Path, toy_file: Path, tmp_path: Path
) -> None:
    served = of_run(sealed.folder, device="cpu") if kind == "run" else of_export(exported)
    images = to_float(sealed.data().test.pixels)
    expected = NetworkVictim.of(sealed.network()).answer(images)
    with running(served, tmp_path) as (url, server):
        contact = Contact.make(f"Http('{url}', size=7)", str(toy_file), tmp_path / "bought")
        answer = contact.victim().answer(images)
        (account,) = server.keys.accounts(everybody=True)
    assert torch.equal(answer.top, expected.top)
    assert torch.allclose(answer.log_p, expected.log_p, atol=1e-4)
    assert (account.billed, account.distinct) == (contact.purchases.billed, contact.purchases.distinct)


def test_every_way_to_ask_gets_the_same_answer(up: tuple[str, Server], sealed: Run, tmp_path: Path) -> None:
    url, server = up
    pixels = sealed.data().test.pixels[:3]
    images = to_float(pixels).numpy()
    pictures = [png(image) for image in to_float(pixels)]
    expected = NetworkVictim.of(sealed.network()).answer(to_float(pixels)).log_p.exp().numpy()
    found = [answer_of(post(infer(url), asked(images)))]
    head = {"name": "images", "datatype": "FP32", "shape": list(images.shape)}
    found.append(answer_of(post_binary(url, head, images.tobytes(), {"binary_data_output": True})))
    encoded = {"name": "images", "datatype": "BYTES", "shape": [3]}
    texts = [base64.b64encode(one).decode() for one in pictures]
    found.append(answer_of(post(infer(url), json.dumps({"inputs": [{**encoded, "data": texts}]}))))
    raw = b"".join(struct.pack("<I", len(one)) + one for one in pictures)
    found.append(answer_of(post_binary(url, encoded, raw, {})))
    for probabilities in found:
        assert np.allclose(probabilities, expected, atol=1e-6)
    for number, picture in enumerate(pictures):
        plain = post(f"{url}/predict", picture, "image/png").json()
        form = httpx2.post(f"{url}/predict", files={"file": ("x.png", picture, "image/png")}).json()
        assert plain == form
        assert plain["class"] == str(expected[number].argmax())
        assert plain["probabilities"][plain["class"]] == pytest.approx(expected[number].max(), abs=1e-6)
    (account,) = server.keys.accounts(everybody=True)
    assert (account.billed, account.distinct) == (4 * 3 + 2 * 3, 3)


def post_binary(url: str, tensor: dict[str, Any], raw: bytes, parameters: dict[str, Any]) -> httpx2.Response:
    tensor = {**tensor, "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
    headers = {"content-type": "application/octet-stream", HEADER: str(len(head))}
    return httpx2.post(infer(url), content=head + raw, headers=headers)


def test_of_the_highest_answers_no_more_is_shown(top: Run, tmp_path: Path, toy_file: Path) -> None:
    images = to_float(top.data().test.pixels)
    expected = NetworkVictim.of(top.network()).answer(images)
    with running(of_run(top.folder, device="cpu"), tmp_path) as (url, _):
        answer = Contact.make(f"Http('{url}')", str(toy_file), tmp_path / "bought").victim().answer(images)
        one = post(f"{url}/predict", png(images[0]), "image/png").json()
        both = post(infer(url), asked(images[:1].numpy())).json()["outputs"]
        named = post(infer(url), asked(images[:1].numpy(), outputs=[{"name": "classes"}])).json()["outputs"]
    assert torch.equal(answer.shown, expected.shown)
    assert torch.allclose(answer.log_p, expected.log_p, atol=1e-4)
    assert list(one["probabilities"]) == [str(place) for place in expected.log_p[0].topk(2).indices.tolist()]
    assert [output["name"] for output in both] == ["probabilities", "classes"]
    assert [output["name"] for output in named] == ["classes"]


def test_a_model_of_labels_shows_labels(served: Served, tmp_path: Path, toy_file: Path, sealed: Run) -> None:
    def labels(images: np.ndarray) -> list[np.ndarray]:
        return [served.predict(images)[0].argmax(1)[:, None]]

    with running(replace(served, outputs=("classes",), predict=labels), tmp_path) as (url, _):
        contact = Contact.make(f"Http('{url}')", str(toy_file), tmp_path / "bought")
        one = post(f"{url}/predict", png(to_float(sealed.data().test.pixels)[0]), "image/png").json()
    assert contact.known.form.name == "LABEL"
    assert list(one) == ["class"]


@pytest.mark.parametrize("name", ["logits", "network", "", None, 3, "probabilities\0"])
def test_nothing_but_the_protected_outputs_has_a_name(name: Any, up: tuple[str, Server]) -> None:
    response = post(infer(up[0]), asked(np.zeros((1, 1, 12, 12)), outputs=[{"name": name}]))
    assert response.status_code == 400
    assert "Valid: probabilities" in response.json()["error"]


def test_a_key_is_needed_and_its_budget_is_exact(served: Served, tmp_path: Path, toy_file: Path, sealed: Run) -> None:
    images = np.zeros((4, 1, 12, 12), np.float32)
    with running(served, tmp_path) as (url, server):
        token = server.keys.add("alice", 10)
        for path in ("/v2", "/v2/models/model", "/metrics"):
            assert httpx2.get(url + path).status_code == 401
        assert httpx2.get(f"{url}/v2/health/ready").status_code == 200
        assert post(infer(url), asked(images)).status_code == 401
        assert post(infer(url), asked(images), authorization="Bearer wrong").status_code == 401
        statuses = [post(infer(url), asked(images), authorization=f"Bearer {token}").status_code for _ in range(3)]
        assert statuses == [200, 200, 403]
        assert post(infer(url), asked(images[:2]), x_api_key=token).status_code == 200
        assert server.keys.accounts()[0].left == 0


def test_a_budget_that_ends_in_the_middle_of_an_audit_costs_nothing_twice(
    served: Served, tmp_path: Path, toy_file: Path, sealed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = to_float(sealed.data().test.pixels)
    with running(served, tmp_path) as (url, server):
        monkeypatch.setenv("UNDISTILL_TOKEN", server.keys.add("first", 90))
        contact = Contact.make(f"Http('{url}', size=8)", str(toy_file), tmp_path / "bought")
        with pytest.raises(VictimError, match=r"budget of this key does not suffice.*images are left"):
            contact.victim().answer(images)
        before = contact.purchases.billed
        assert before == server.keys.accounts()[0].billed
        monkeypatch.setenv("UNDISTILL_TOKEN", server.keys.add("second", 90, days=1e-9))
        with pytest.raises(VictimError, match="expired"):
            contact.victim().answer(images)
        monkeypatch.setenv("UNDISTILL_TOKEN", server.keys.add("third", 90))
        again = Contact.make(f"Http('{url}', size=8)", str(toy_file), tmp_path / "bought")
        again.victim().answer(images)
        billed = {one.name: one.billed for one in server.keys.accounts()}
    assert billed["first"] + billed["third"] == again.purchases.billed
    assert billed["second"] == 0
    assert again.purchases.distinct == len({image.numpy().tobytes() for image in images}) + 64


def test_without_keys_only_programs_of_this_machine_are_answered(served: Served, tmp_path: Path) -> None:
    """Neither a proxy that brings others, nor a page in a browser that was led here under another name."""
    foreign = ({"x-forwarded-for": "9.9.9.9"}, {"via": "1.1 proxy"}, {"host": "evil.example"}, {"origin": "http://x.y"})
    with running(served, tmp_path) as (url, _):
        assert all(httpx2.get(f"{url}/v2", headers=headers).status_code == 401 for headers in foreign)
        assert httpx2.get(f"{url}/v2").status_code == 200
    with running(served, tmp_path, anybody=True) as (url, _):
        assert all(httpx2.get(f"{url}/v2", headers=headers).status_code == 200 for headers in foreign)


def test_events_are_told_once_also_after_a_restart_and_not_of_what_was_not_answered(
    served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(images: np.ndarray) -> list[np.ndarray]:
        raise ValueError

    def told() -> list[str]:
        return [str(record.fields["key"]) for record in caplog.records if record.getMessage() == "a copy can be bought"]

    with running(replace(served, audited=AUDITED, predict=broken), tmp_path) as (url, _):
        for _ in range(3):
            post(infer(url), asked(np.zeros((4, 1, 12, 12))))
    assert told() == []
    with running(served, tmp_path) as (url, _):  # with no curve, nothing is told
        post(infer(url), asked(np.zeros((5, 1, 12, 12))))
    for _ in range(2):
        with running(replace(served, audited=AUDITED), tmp_path) as (url, server):
            server.events.catch_up()
            post(infer(url), asked(np.zeros((1, 1, 12, 12))))
    assert sorted(told()) == ["all keys", "anybody"]


def test_events_are_logged_and_posted_once_where_the_curve_says(
    served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    posted: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    hook = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{hook.server_port}"
    up = running(replace(served, audited=AUDITED), tmp_path, webhook=address)
    with caplog.at_level(logging.INFO, "undistill.serving"), up as (url, server):
        tokens = [server.keys.add(name, None) for name in ("alice", "bob")]
        for token in (tokens[0], tokens[1], tokens[0]):
            post(infer(url), asked(np.zeros((3, 1, 12, 12))), authorization=f"Bearer {token}")
        metrics = httpx2.get(f"{url}/metrics", headers={"authorization": f"Bearer {tokens[0]}"}).text
    hook.shutdown()
    expected = [("all keys", 6, 4, 10.0), ("alice", 6, 4, 10.0), ("all keys", 9, 8, 5.0)]
    found = [(one["key"], one["billed"], one["queries"], one["within_points"]) for one in posted]
    assert sorted(found) == sorted(expected)
    logged = [record.fields["key"] for record in caplog.records if record.getMessage() == "a copy can be bought"]
    assert sorted(logged) == ["alice", "all keys", "all keys"]
    assert 'undistill_curve_events_total{gap="0.1"} 2.0' in metrics


def test_metrics_and_log_hold_counts_and_nothing_of_answers(
    served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture, sealed: Run
) -> None:
    images = to_float(sealed.data().test.pixels)[:2].numpy()
    with caplog.at_level(logging.INFO, "undistill.serving"), running(served, tmp_path) as (url, server):
        p = answer_of(post(infer(url), asked(images)))
        token = server.keys.add("alice", 0)
        metrics = httpx2.get(f"{url}/metrics", headers={"authorization": f"Bearer {token}"}).text
    assert 'undistill_requests_total{place="infer",status="200"} 1.0' in metrics
    assert "undistill_images_total 2.0" in metrics
    assert "alice" not in metrics
    lines = [str(record.fields) for record in caplog.records if hasattr(record, "fields")]
    assert any("'images': 2" in line for line in lines)
    for text in (metrics, *lines):
        assert f"{p[0].max():.6g}"[:6] not in text
        assert token.split(".")[1] not in text


def test_only_an_address_of_this_machine_is_served_without_keys(sealed: Run) -> None:
    with pytest.raises(SpecError, match="no keys"):
        serve(sealed.folder, host="0.0.0.0", port=0)


def test_what_cannot_be_served_is_said(sealed: Run, honest: Run, tmp_path: Path, exported: Path) -> None:
    with pytest.raises(SpecError, match="Name what is served"):
        serve()
    with pytest.raises(SpecError, match="Cannot listen"), socket.create_server(("127.0.0.1", 0)) as taken:
        serve(sealed.folder, port=taken.getsockname()[1])
    with pytest.raises(SpecError, match="exported folder"):
        serve(exported, model="net.py:make")
    for named in ("Sealed(levels=4)", "Rounding()"):
        with pytest.raises(SpecError, match="nothing is protected anew"):
            serve(sealed.folder, defences=[named])
    torch_alone = export(sealed, tmp_path / "torch", format="torch")
    with pytest.raises(StoreError, match="may run code"):
        of_export(torch_alone)
    for name in ("", "a/b", "{x}"):
        with pytest.raises(SpecError, match="cannot be a model's name"):
            serve(sealed.folder, name=name)
    with pytest.raises(SpecError, match="--device"):
        serve(exported, device="cpu")
    with pytest.raises(SpecError, match="--state"):
        serve(upstream="Http('http://127.0.0.1:1')", defences=["Sealed()"])


def test_an_export_that_was_changed_is_not_served(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in exported.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "model.onnx").write_bytes(b"\x08\x07")
    with pytest.raises(StoreError, match="not the file that was exported"):
        of_export(copy)


def test_keys_by_the_command_line(sealed: Run, exported: Path) -> None:
    runner = CliRunner()
    place = str(sealed.folder)
    made = runner.invoke(app, ["serve", "keys", "add", place, "alice", "--budget", "5", "--days", "30"])
    assert made.exit_code == 0, made.output
    token = made.stdout.splitlines()[-1]
    listed = runner.invoke(app, ["serve", "keys", "list", place]).stdout
    assert "alice" in listed
    assert token not in listed
    assert runner.invoke(app, ["serve", "keys", "revoke", place, "alice"]).exit_code == 0
    assert "revoked" in runner.invoke(app, ["serve", "keys", "list", place]).stdout
    for wrong in (["add", place, "bob"], ["add", place, "bob", "--budget", "x"], ["revoke", place, "bob"]):
        found = runner.invoke(app, ["serve", "keys", *wrong])
        assert found.exit_code == 2
        assert "Error: " in found.stderr
