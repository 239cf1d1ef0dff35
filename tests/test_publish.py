"""Publish and load against a Hub on loopback, in a process whose Hub it is from the start."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_server import Failure, HubServer

ROOT = Path(__file__).parents[1]
WORKER = """
import contextlib, io, json, sys, traceback
names, answers = {}, sys.stdout
for line in sys.stdin:
    out, error, told = io.StringIO(), None, io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
        names["result"] = None
        try:
            exec(json.loads(line), names)
        except SystemExit as stop:
            error = f"exit {stop.code}"
        except Exception as failed:
            error = f"{type(failed).__name__}: {failed}"
    found = {"result": names["result"], "out": out.getvalue(), "err": told.getvalue(),
             "error": error}
    answers.write(json.dumps(found) + "\\n")
    answers.flush()
"""
SETUP = """
import json, logging, os, torch, statezoo
from pathlib import Path
from statezoo.main import main
from statezoo.datamodules.tokenizers import Bytes
from statezoo.folder import check_folder, fixture_nll
torch.manual_seed(0)
class Told(logging.Handler):
    lines = []
    def emit(self, record):
        self.lines.append(record.getMessage())
logging.getLogger("statezoo").addHandler(Told())
shape = dict(vocab_size=256, d_model=16, n_layers=1, n_heads=2)
def make(folder, text="To be"):
    net = statezoo.create_model("gla", **shape)
    net.save_pretrained(folder)
    Bytes().save(folder)
    ids = [10, *text.encode()]
    fixture = {"input": text, "ids": ids, "nll": fixture_nll(net, ids)}
    Path(folder, "metrics.json").write_text(json.dumps(
        {"results": {"test/nll": 5.5}, "fixture": fixture}))
    Path(folder, "README.md").write_text(CARD)
    Path(folder, "sample.png").write_bytes(b"\\x89PNG" + bytes(5000))
    return net
def same(a, b):
    ids = torch.arange(24).reshape(2, 12)
    a, b = a.eval(), b.eval()
    with torch.no_grad():
        logits = torch.equal(a(ids).logits, b(ids).logits)
    one, two = a.state_dict(), b.state_dict()
    return logits and one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
"""
CARD = """---
license: mit
library_name: statezoo
pipeline_tag: text-generation
datasets: [org/text]
model-index:
- name: tiny
  results:
  - task: {type: text-generation}
    dataset: {name: text, type: org/text}
    metrics: [{type: nll, name: test/nll, value: 5.5}]
---
# tiny
"""


class Worker:
    """A Python whose huggingface_hub knows no other Hub."""

    def __init__(self, hub, folder):
        free = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN")
        more = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], cwd=folder, text=True,
            env={k: v for k, v in os.environ.items() if k not in free} | more,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self(f"CARD = {CARD!r}\n{SETUP}")

    def ask(self, source):
        self.process.stdin.write(json.dumps(source) + "\n")
        self.process.stdin.flush()

    def answer(self):
        return json.loads(self.process.stdout.readline())

    def tried(self, source):
        """What came of it, an error too."""
        self.ask(source)
        return self.answer()

    def __call__(self, source):
        found = self.tried(source)
        assert found["error"] is None, found
        return found

    def fails(self, source):
        """The error that must come, as one line."""
        found = self.tried(source)
        assert found["error"], f"no error; {found}"
        return found["err"] if found["error"].startswith("exit 2") else found["error"]

    def run(self, *arguments, token="hf_writes"):
        """A command line, with a token."""
        return self(self.command(*arguments, token=token))["out"]

    def refused(self, *arguments, token="hf_writes"):
        return self.fails(self.command(*arguments, token=token))

    @staticmethod
    def command(*arguments, token):
        change = "os.environ.pop('HF_TOKEN', None)" if token is None else (
            f"os.environ['HF_TOKEN'] = {token!r}"
        )  # fmt: skip
        return f"{change}; main({[*map(str, arguments)]!r})"

    def stop(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def hub():
    server = HubServer()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("publish")


@pytest.fixture(scope="module")
def workers(hub, place):
    """The worker; a test that kills it puts another in its place."""
    found = [Worker(hub, place)]
    found[0]("net = make('tiny')")
    yield found
    found[-1].stop()


@pytest.fixture
def worker(workers, hub):
    hub.log.clear()
    hub.failures.clear()
    workers[-1]("os.environ['HF_TOKEN'] = 'hf_writes'; Told.lines.clear()")
    return workers[-1]


@pytest.fixture
def published(worker, hub):
    """A private model on the Hub, and its commit."""
    if "org/tiny" not in hub.repos:
        worker.run("publish", "tiny", "org/tiny")
        hub.log.clear()
    return hub.repos["org/tiny"].branches["main"]


def test_what_is_published_loads_back_bit_for_bit(worker, hub, place):
    out = worker.run("publish", "tiny", "org/first", "--message", "The first")
    repo = hub.repos["org/first"]
    sha = repo.branches["main"]
    assert out.splitlines() == [
        f"{hub.url}/org/first",
        f'statezoo.load("org/first", revision="{sha}")  # private: needs a token',
    ]
    assert repo.private
    assert repo.messages == ["initial commit", "The first"]  # one commit
    files = {f.name: f.read_bytes() for f in (place / "tiny").iterdir()}
    assert repo.commits[sha] == files | {".gitattributes": b"* text\n"}
    call = out.splitlines()[1]
    assert worker(f"result = same({call.partition('#')[0]}, net)")["result"] is True
    assert worker("result = same(statezoo.load('org/first'), net)")["result"] is True
    assert worker("result = Told.lines")["result"] == []
    # and again: nothing has changed, so nothing is sent
    hub.log.clear()
    assert worker.run("publish", "tiny", "org/first") == out
    assert not hub.sent("PUT")
    assert len(repo.messages) == 2


def test_a_revision_is_a_branch_of_its_own(worker, hub, published):
    worker("other = make('other')")
    before = hub.repos["org/tiny"].branches["main"]
    worker.run("publish", "other", "org/tiny", "--revision", "larger")
    assert hub.repos["org/tiny"].branches["main"] == before
    load = "statezoo.load('org/tiny', revision='larger')"
    assert worker(f"result = same({load}, other), same({load}, net)")["result"] == [True, False]
    assert "publish writes to a branch" in worker.refused(
        "publish", "tiny", "org/tiny", "--revision", before
    )


def test_public_is_said(worker, hub):
    worker.run("publish", "tiny", "org/open", "--public")
    assert not hub.repos["org/open"].private
    assert worker("del os.environ['HF_TOKEN']; result = same(statezoo.load('org/open'), net)")
    told = worker.refused("publish", "tiny", "org/open")
    assert "'org/open' exists and is public: say --public to publish there" in told
    worker.run("publish", "tiny", "org/closed")
    out = worker.run("publish", "tiny", "org/closed", "--public")
    assert f"stays private: {hub.url}/org/closed/settings changes that" in out


def test_a_dry_run_asks_nobody(worker, hub, place):
    out = worker.run("publish", "tiny", "org/dry", "--dry_run", token=None)
    assert hub.log == []
    lines = out.splitlines()
    assert lines[0].startswith(f"would send to {hub.url}/org/dry, branch main (private if new)")
    sizes = {f.name: f.stat().st_size for f in (place / "tiny").iterdir()}
    listed = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in lines[1:-1]}
    assert listed == sizes
    assert lines[-1].split()[:3] == [str(len(sizes)), "files", f"{sum(sizes.values()):,}"]


def test_an_interrupted_upload_goes_on(workers, worker, hub, place):
    weights = (place / "tiny/model.safetensors").stat().st_size
    worker("make('cut')")
    hub.failures.append(Failure("PUT", "/blobs/", drop_after=weights // 2, hang=True))
    hub.blobs.clear()
    hub.hung.clear()
    (place / "cut/sample.png").unlink()
    worker.ask(worker.command("publish", "cut", "org/cut", token="hf_writes"))
    assert hub.hung.wait(120)
    worker.process.send_signal(signal.SIGKILL)  # half of the weights are there
    worker.stop()
    assert len(hub.repos["org/cut"].messages) == 1  # and nothing is to be seen of them
    workers.append(Worker(hub, place))
    worker = workers[-1]
    worker("net = statezoo.load('tiny'); os.environ['HF_TOKEN'] = 'hf_writes'")
    assert worker.fails("statezoo.load('org/cut')").startswith(
        "HubError: 'org/cut' holds no model of statezoo: it has neither config.json nor adapter"
    )
    worker.run("publish", "cut", "org/cut")
    want = "same(statezoo.load('org/cut'), statezoo.load('cut'))"
    assert worker(f"result = {want}")["result"] is True
    # what a lost connection left is not sent again: of two files, the one that is there already
    (place / "cut/sample.png").write_bytes(b"\x89PNG" + bytes(9000))
    worker("_ = make('cut2'); Path('cut2/sample.png').write_bytes(b'PNG' * 999)")
    hub.failures.append(Failure("POST", "/commit/", status=503))
    told = worker.refused("publish", "cut2", "org/cut2")
    assert f"{hub.url} has trouble (503): try again later" in told
    assert len(hub.sent("PUT")) == 4  # half, whole; two of the second model
    hub.log.clear()
    worker.run("publish", "cut2", "org/cut2")
    assert hub.sent("PUT") == []


@pytest.mark.parametrize(
    ("token", "told"),
    [
        ("hf_wrong", "the Hub does not know the token in HF_TOKEN: make a new one at {url}/settings"
                     "/tokens, then run `hf auth login`, or set HF_TOKEN."),
        (None, "publishing needs a token that may write: run `hf auth login`, or set HF_TOKEN."),
        ("hf_reads", "the token in HF_TOKEN may not write to 'org' (You don't have the rights to "
                     "write under org): choose another name or another token, see {url}/settings"
                     "/tokens."),
    ],
)  # fmt: skip
def test_who_may_not_write(token, told, worker, hub):
    error = worker.refused("publish", "tiny", "org/mine", token=token)
    assert error == f"statezoo publish: error: {told.format(url=hub.url)}\n"
    assert "org/mine" not in hub.repos


def test_what_cannot_be_loaded(worker, hub, published):
    def load(name, saved="hf_reads", **more):
        given = "".join(f", {key}={value!r}" for key, value in more.items())
        change = worker.command(token=saved).partition(";")[0]
        return worker.fails(f"{change}\nstatezoo.load({name!r}{given})")

    missing = "HubError: there is no folder '{}' here and no model '{}' on {}, or it is private "
    start = missing.format("org/none", "org/none", hub.url)
    end = "which looks the same from here: check the name, or run `hf auth login`, or set HF_TOKEN."
    assert load("org/none") == f"{start}and the token in HF_TOKEN may not read it, {end}"
    assert load("org/none", None) == f"{start}and no token was given, {end}"
    assert load("org/none", token="hf_other") == (
        "HubError: the Hub does not know the token that was passed: make a new one at "
        f"{hub.url}/settings/tokens, then run `hf auth login`, or set HF_TOKEN."
    )
    assert "'org/tiny' here and no model" in load("org/tiny", None)  # private
    assert "does not know the token in HF_TOKEN" in load("org/tiny", "hf_wrong")
    assert load("org/tiny", revision="v9") == (
        f"HubError: 'org/tiny' has no revision 'v9': {hub.url}/org/tiny/commits/main shows what "
        "there is."
    )
    assert load("org/a b").startswith("HubError: 'org/a b' is no id of the Hub: write organisation")
    assert load("a/b/c").startswith("FileNotFoundError: a/b/c is not a folder, and no Hub id")


def test_repositories_of_other_things(worker, hub):
    def repository(name, **files):
        hub.repos[name] = type(hub.repos["org/tiny"])(private=False)
        content = {key.replace("__", "."): value for key, value in files.items()}
        hub.repos[name].commit("main", content, "made")
        hub.log.clear()
        return worker.fails(f"statezoo.load({name!r})")

    worker.run("publish", "tiny", "org/tiny")
    weights = b"x" * 100
    told = repository("o/bert", config__json=b'{"model_type": "bert"}', model__safetensors=weights)
    assert told.startswith("HubError: 'o/bert' holds a model of type 'bert'; statezoo reads its")
    assert not any("safetensors" in path for path in hub.sent("GET"))  # told before the download
    told = repository("o/data", README__md=b"# data")
    assert "'o/data' holds no model of statezoo: it has neither config.json nor" in told
    told = repository("o/text", config__json=b"<html>")
    assert told == "HubError: 'o/text' holds no model: its config.json is not JSON."
    told = repository("o/empty", config__json=b'{"model_type": "statezoo"}')
    assert told == "HubError: 'o/empty' has settings, but no weights: no model.safetensors."
    base = b'{"kind": "lora", "base": "runs/b.ckpt", "base_fingerprint": "", "network": "", '
    told = repository("o/mine", adapter__json=base + b'"config": {}}')
    assert told.startswith("HubError: 'o/mine' holds an adapter of 'runs/b.ckpt', which is a file")


def test_a_download_that_breaks_off_goes_on(worker, hub, published, place):
    size = (place / "tiny/model.safetensors").stat().st_size
    cold = "cache_dir='cold'"
    hub.failures.append(Failure("GET", "model.safetensors", drop_after=size // 2))
    assert worker(f"result = same(statezoo.load('org/tiny', {cold}), net)")["result"] is True
    paths = [path for path in hub.sent("GET") if path.endswith("model.safetensors")]
    assert len(paths) == 2  # the half, and the rest
    # cut off for good, by a client that gives up, nothing half is left for a whole
    worker("from huggingface_hub import file_download as f; f.time.sleep = lambda s: None")
    cold = "cache_dir='colder'"
    hub.failures.append(Failure("GET", "model.safetensors", drop_after=0, times=99))
    told = worker.fails(f"statezoo.load('org/tiny', {cold})")
    assert told == (
        f"HubError: the connection to {hub.url} was lost: the same command goes on where it was."
    )
    assert not [*(place / "colder").rglob("model.safetensors")]
    hub.stop()
    told = worker.fails(f"statezoo.load('org/tiny', {cold})")
    hub.start()
    assert told.endswith("; the copy of 'org/tiny' in the cache is not whole.")
    hub.failures.clear()
    assert worker(f"result = same(statezoo.load('org/tiny', {cold}), net)")["result"] is True


def test_without_network(worker, hub, published):
    worker("statezoo.load('org/tiny')")
    hub.stop()
    try:
        assert worker("result = same(statezoo.load('org/tiny'), net)")["result"] is True
        (told,) = worker("result = Told.lines")["result"]
        start = f"used the copy of 'org/tiny' in the cache, commit {published[:8]}: cannot reach "
        assert told.startswith(f"{start}{hub.url} (")
        assert told.endswith("): check the network, the proxy and HF_ENDPOINT.")
        told = worker.fails("statezoo.load('org/never')")
        assert told.startswith(f"HubError: cannot reach {hub.url} (")
        assert told.endswith("; the cache has no copy of 'org/never'.")
        assert f"cannot reach {hub.url}" in worker.refused("publish", "tiny", "org/tiny")
    finally:
        hub.start()
    offline = "import huggingface_hub.constants as c; c.HF_HUB_OFFLINE = {}\n"
    assert worker(offline.format(True) + "statezoo.load('org/tiny')")
    told = worker.fails("statezoo.load('org/never')")
    worker(offline.format(False))
    assert told == (
        "HubError: HF_HUB_OFFLINE is set, so the Hub is not asked: unset it to go on line; the "
        "cache has no copy of 'org/never'."
    )
    assert worker.fails("statezoo.load('org/never', local_files_only=True)") == (
        "HubError: the cache has no copy of 'org/never', and local_files_only=True forbids to ask "
        "the Hub."
    )


def test_the_hub_takes_no_more_requests(worker, hub, published):
    limit = Failure("GET", "/api/models/org/", 429, {"Retry_After": "7"}, times=2)
    hub.failures.append(limit)
    assert worker.fails("statezoo.load('org/fresh')") == (
        f"HubError: {hub.url} takes no more requests for now (429): try again in 7 seconds; the "
        "cache has no copy of 'org/fresh'."
    )
    assert worker("result = same(statezoo.load('org/tiny'), net)")["result"] is True
    assert "takes no more requests" in worker("result = Told.lines")["result"][0]


def test_generate_takes_a_name(worker, hub, published):
    say = ["--prompt", "To", "--max_new_tokens", "4", "--seed", "1"]
    out = worker.run("generate", "--model", "org/tiny", *say)
    assert out == worker.run("generate", "--model", "tiny", *say)
    told = worker.refused("generate", "--model", "org/none", *say)
    assert told.startswith("statezoo generate: error: there is no folder 'org/none' here")
    assert len(told.splitlines()) == 1


def test_an_adapter_alone(worker, hub, published, place):
    worker("""
from statezoo.lightning_modules import architectures
from statezoo.lightning_modules.adapter import save_adapter
module = architectures.GLA(**shape, pretrained="org/tiny", tune="state")
with torch.no_grad():
    for p in module.net.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p))
save_adapter(module, "adapter")
""")
    told = worker.refused("publish", "adapter", "org/tuned")
    assert told.startswith("statezoo publish: error: adapter cannot be published:\n  README.md is")
    card = "---\nlicense: mit\nlibrary_name: statezoo\nbase_model: org/tiny\n---\n"
    (place / "adapter/README.md").write_text(card)
    worker.run("publish", "adapter", "org/tuned")
    assert sorted(hub.repos["org/tuned"].commits[hub.repos["org/tuned"].branches["main"]]) == [
        ".gitattributes", "README.md", "adapter.json", "adapter_model.safetensors",
    ]  # fmt: skip
    ids = "torch.arange(24).reshape(2, 12)"
    assert (
        worker(f"""
want = module.net.eval()({ids}).logits
found = statezoo.load("org/tuned").eval()({ids}).logits
result = (want - found).abs().max().item(), (net.eval()({ids}).logits - want).abs().max().item()
""")["result"][0]
        < 1e-6
    )
    assert worker.run("generate", "--model", "org/tuned", "--prompt", "a").startswith("a")
    file = place / "adapter/adapter.json"
    file.write_text(file.read_text().replace("org/tiny", "runs/x/best.ckpt"))
    told = worker.refused("publish", "adapter", "org/tuned")
    assert "adapter.json names as base 'runs/x/best.ckpt', which is on this machine alone" in told


def test_folders_that_are_refused(worker, hub, place):
    (place / "bad").mkdir()
    (place / "bad/weights.bin").write_bytes(b"")
    told = worker.refused("publish", "bad", "org/bad").splitlines()
    assert told[0] == "statezoo publish: error: bad cannot be published:"
    assert told[1] == (
        "  weights.bin is or may hold a pickle, which runs code where it is read: remove it."
    )
    assert told[2].startswith("  README.md is missing: `statezoo card RUN OUT --about ABOUT.yaml`")
    (place / "run").mkdir()
    (place / "run/best.ckpt").write_bytes(b"")
    told = worker.refused("publish", "run", "org/run")
    assert (
        "'run' is a run, which has no card: write a folder with one by `statezoo card run" in told
    )
    assert "there is no folder 'gone'" in worker.refused("publish", "gone", "org/run")
    assert "needs organisation/name, got 'tiny'" in worker.refused("publish", "tiny", "tiny")
    assert "'o/a b' is no id of the Hub" in worker.refused("publish", "tiny", "o/a b")
    assert hub.log == []
