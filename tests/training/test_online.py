"""An online run against a server of our own: what W&B's client really sends, and what it makes of a restart."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import wandb

from ndeflow.training.records import Records
from ndeflow.training.tracking import Tracker, Wandb, run_id


class Server(ThreadingHTTPServer):
    """What W&B's server knows of runs, by id, as far as its client asks for it."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs, self.uploads = {}, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, query, variables):
        """The data of a GraphQL query, by what it asks for."""
        name = variables.get("name")
        if "upsertBucket(" in query:
            new = name not in self.runs
            run = self.runs.setdefault(name, {"history": {}, "summary": "{}", "starts": 0, "exit_codes": []})
            run |= {key: variables[key] for key in ("config", "displayName", "project") if variables.get(key)}
            return {"upsertBucket": {"bucket": self.bucket(name), "inserted": new}}
        if "createRunFiles(" in query:
            files = [{"name": file, "uploadUrl": f"{self.url}/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": name, "uploadHeaders": [], "files": files}}
        if "historyTail" in query:
            return {"model": {"bucket": self.bucket(name) if name in self.runs else None}}
        return {"viewer": None, "entity": {"organization": None}, "serverInfo": {"features": []}}

    def bucket(self, name):
        run = self.runs[name]
        lines = [run["history"][i] for i in sorted(run["history"])]
        began = json.loads(run["config"])["_wandb"]["value"]["t"]  # its presence says that the run has begun
        return {
            **{"id": f"internal-{name}", "name": name, "displayName": run["displayName"], "config": run["config"]},
            **{"project": {"id": "p", "name": run["project"], "entity": {"id": "e", "name": "team"}}, "tags": []},
            **{"historyLineCount": len(lines), "historyTail": json.dumps(lines[-1:]), "summaryMetrics": run["summary"]},
            **{"eventsLineCount": 0, "eventsTail": "[]", "logLineCount": 0, "wandbConfig": json.dumps({"t": began})},
        }

    def stream(self, name, message):
        """Take lines at their offset, the newest summary, and the end of a process."""
        run, files = self.runs[name], message.get("files") or {}
        if "wandb-history.jsonl" in files:
            part = files["wandb-history.jsonl"]
            run["history"] |= dict(enumerate(part["content"], part["offset"]))
        if "wandb-summary.json" in files:
            run["summary"] = files["wandb-summary.json"]["content"][-1]
        if message.get("complete"):
            run["exit_codes"].append(message["exitcode"])

    def lose(self, name, lines):
        """Know only the first lines: the process was killed before its client had sent the rest."""
        run = self.runs[name]
        run["history"] = {i: line for i, line in run["history"].items() if i < lines}
        run["summary"] = run["history"][lines - 1]

    def rows(self, name):
        """The numbers of the history, in order."""
        rows = [json.loads(line) for _, line in sorted(self.runs[name]["history"].items())]
        return [(row["trainer/global_step"], row["a"]) for row in rows if "a" in row]


class Handler(BaseHTTPRequestHandler):
    """HTTP around `Server`."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        data = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            data = {"data": self.server.answer(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body))
        self.reply(data)

    def do_PUT(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.uploads.append(self.path[1:])
        self.reply({})

    def reply(self, data):
        text = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        """Be quiet."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that this process is logged in to."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.delenv("WANDB_MODE")
    for name, value in {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "x" * 40, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # settings of earlier tests
    yield server
    wandb.teardown()
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_online_run_is_one_run_across_restarts(server, tmp_path):
    folder, config = tmp_path / "moons", {"seed": 1, "module": {"_target_": "m.A"}}
    folder.mkdir()

    def start(resumed_at, steps, exit_code):
        records = Records(folder, Tracker(Wandb(project="study"), "online", folder, config), resumed_at)
        for step in steps:
            records.log_metrics({"a": 10 * step}, step)
        url = records.tracker.url
        records.close(exit_code)
        return url

    urls = [start(0, range(1, 6), 85)]  # preempted after step 5
    urls += [start(5, range(6, 10), 85)]  # killed after a checkpoint at step 7: the server has heard of step 6 at last
    (name,) = server.runs
    server.lose(name, 6)
    urls += [start(7, range(8, 13), 0)]
    run = server.runs[name]
    assert name == run_id(folder)
    assert len(set(urls)) == 1
    assert (run["displayName"], run["project"], run["exit_codes"]) == ("moons", "study", [85, 85, 0])
    sent = {key: entry["value"] for key, entry in json.loads(run["config"]).items()}
    assert {key: sent[key] for key in config} == config
    # Each step is there with its value, in order; the last seen one once more, lest its validation row be missing.
    rows = server.rows(name)
    assert rows == sorted(rows)
    assert dict(rows) == {step: 10 * step for step in range(1, 13)}
    assert len(rows) == 12 + 2
    assert json.loads(run["summary"])["trainer/global_step"] == 12


def test_pictures_and_the_report_arrive(server, tmp_path):
    folder = tmp_path / "moons"
    folder.mkdir()
    records = Records(folder, Tracker(Wandb(), "online", folder, {}))
    records.log_pictures({"samples": np.zeros((8, 8), np.uint8)}, 3)
    picture = folder / "media/samples_00000003.png"
    records.tracker.summarize({"step": 4, "w2": 0.5}, [picture])
    records.close(0)
    media = [file for file in server.uploads if file.startswith("media/images/")]
    assert [file.rsplit("_", 2)[0] for file in sorted(media)] == [
        "media/images/report/samples_00000003",
        "media/images/samples",
    ]
    assert json.loads(server.runs[run_id(folder)]["summary"])["report/w2"] == 0.5


def test_a_key_is_believed_whatever_the_server_says_and_what_is_none_refused(server, monkeypatch):
    assert Wandb().resolve() == ("online", "logged in")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    wandb.teardown()
    with pytest.raises(ValueError, match=r"must have 40\+ characters, has 5\.; correct it, or set wandb\.mode=offline"):
        Wandb().resolve()


def test_a_server_out_of_reach_costs_a_warning_and_the_next_start_makes_up_for_it(server, tmp_path, monkeypatch):
    folder = tmp_path / "moons"
    folder.mkdir()
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()
    tracker = Tracker(Wandb(), "online", folder, {})
    with pytest.warns(UserWarning, match="W&B is offline from here to the next start: "):
        records = Records(folder, tracker)
    records.log_metrics({"a": 1}, 1)
    records.close(0)
    assert (tracker.mode, tracker.url) == ("offline", None)
    assert list((folder / "wandb").glob("offline-run-*"))
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    wandb.teardown()
    records = Records(folder, Tracker(Wandb(), "online", folder, {}), resumed_at=2)
    records.close(0)
    assert server.rows(run_id(folder)) == [(1, 1)]
    assert not list((folder / "wandb").glob("offline-run-*"))
