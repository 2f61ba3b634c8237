"""Names on the Hub, against a small one in this process: what is downloaded, where to, and what is said when it is not.

Commands run in processes of their own, because huggingface_hub reads the environment once.
"""

import hashlib
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import peft
import pytest
import safetensors.torch
import torch
import transformers

import camelid
from camelid.checkpoint.files import MANIFEST
from camelid.checkpoint.hub import find_checkpoint_folder
from runs import TIMEOUT_S, assert_refused, command, tensor_bytes

NAME, TOKEN = "herd/stories", "hf_of_this_test"
BESIDE = {
    *("README.md", "LICENSE", "chat_template.jinja", "config.json", "generation_config.json"),
    *("special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
}
DECOYS = """
    .gitattributes config.v5.json training_args.bin optimizer.pt rust_model.ot tf_model.h5 flax_model.msgpack
    consolidated.00.pth consolidated.safetensors adapter_model.safetensors model-Q4_K_M.gguf onnx/model.onnx
    model.fp16.safetensors model.safetensors.index.fp16.json model-00001-of-00002.fp16.safetensors
    original/params.json original/tokenizer.model original/model.safetensors tokenizer/model.bin
    pytorch_model.fp16.bin README/herd.png
""".split()
PATH = re.compile(r"(?:/api/models)?/([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)(?:/(.+))?")
EMPTY: Mapping[str, str] = {}
Files = Mapping[str, bytes]

# The Hub --------------------------------------------------------------------------------


@dataclass
class Repository:
    files: Files
    revision: str = "main"
    refuse_info: tuple[int, dict[str, str]] | None = None
    """a status and headers, for those who ask what is there"""
    refuse_files: tuple[int, dict[str, str]] | None = None
    """the same, for those who ask for a file"""
    breaks: str | None = None
    """the file that is cut in the middle"""

    @property
    def commit(self) -> str:
        return hashlib.sha1(self.revision.encode()).hexdigest()


class Request(NamedTuple):
    method: str
    what: str
    revision: str
    file: str
    token: str | None


@dataclass
class Hub:
    endpoint: str
    repositories: dict[str, list[Repository]] = field(default_factory=dict)
    """by name: one for each revision"""
    asked: list[Request] = field(default_factory=list)

    def downloaded(self) -> list[str]:
        return sorted(request.file for request in self.asked if request.method == "GET" and request.what == "resolve")


class Answer(BaseHTTPRequestHandler):
    def __init__(self, hub: Hub, *rest: object):
        self.hub = hub
        super().__init__(*rest)

    def log_message(self, *about: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        asked = PATH.fullmatch(urlsplit(self.path).path)
        if asked is None:
            return self.answer(404)  # huggingface_hub asks about the program that it runs in
        name, what, revision, file = (unquote(part or "") for part in asked.groups())
        self.hub.asked.append(Request(self.command, what, revision, file, self.headers["Authorization"]))
        found = self.hub.repositories.get(name)
        if found is None:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        repository = next((r for r in found if revision in (r.revision, r.commit)), None)
        if repository is None:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        refusal = repository.refuse_files if what == "resolve" else repository.refuse_info
        if refusal is not None:
            return self.answer(*refusal)
        if what == "revision":
            return self.answer_json({"id": name, "sha": repository.commit})
        if what == "tree":
            sizes = {path: len(content) for path, content in repository.files.items()}
            return self.answer_json([{"type": "file", "path": p, "size": n, "oid": p} for p, n in sizes.items()])
        content = repository.files[file]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": repository.commit}
        return self.answer(200, headers, content, breaks=file == repository.breaks and self.command == "GET")

    def answer_json(self, value: object) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def answer(
        self, status: int, headers: Mapping[str, str] = EMPTY, content: bytes = b"", breaks: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if breaks:
            self.wfile.write(content[: len(content) // 2])
            # Lingering for no time, the connection is reset, as by a network that goes away.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        elif self.command == "GET":
            self.wfile.write(content)


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub("")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Answer, hub)) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


def child_env(hub: Hub, home: Path) -> dict[str, str]:
    """Little more than what these tests mean: no token, proxy or offline mode of the one who runs them."""
    env = {name: value for name, value in os.environ.items() if name == "PATH" or name.startswith("JAX_")}
    # The camelid of this process, which need not be the installed one.
    env |= {"HOME": str(home), "PYTHONPATH": str(Path(camelid.__file__).parents[1])}
    return env | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home / "hf"), "HF_TOKEN": TOKEN}


@pytest.fixture
def env(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return child_env(hub, tmp_path / "home")


FIND = """
import json, sys
from camelid.checkpoint.hub import UserError, find_checkpoint_folder
for name in sys.argv[1:]:
    try:
        print(json.dumps(str(find_checkpoint_folder(name))))
    except UserError as error:
        print(json.dumps([error.problem, error.advice]))
"""


def found(*names: str, env: Mapping[str, str]) -> list[Any]:
    """For each name the folder, or the problem and the advice; in one process, quicker than commands."""
    result = subprocess.run(
        [sys.executable, "-c", FIND, *names], env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


# What is on it --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_files(stories: Path) -> dict[str, bytes]:
    """Everything but weights, and much that nobody needs."""
    files = {name: f"{name} of somebody".encode() for name in ["README.md", "LICENSE", "chat_template.jinja", *DECOYS]}
    return files | {file.name: file.read_bytes() for file in stories.iterdir() if file.name != "model.safetensors"}


@pytest.fixture(scope="module")
def weights(stories: Path) -> dict[str, Files]:
    """The same weights in each form."""
    whole = (stories / "model.safetensors").read_bytes()
    tensors = safetensors.torch.load(whole)
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in some} for some in (names[:20], names[20:])]

    def sharded(single: str, shards: list[str], contents: list[bytes]) -> Files:
        weight_map = {name: shard for shard, part in zip(shards, parts, strict=True) for name in part}
        index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
        return {f"{single}.index.json": index, **dict(zip(shards, contents, strict=True))}

    def torch_saved(value: dict[str, torch.Tensor]) -> bytes:
        file = io.BytesIO()
        torch.save(value, file)
        return file.getvalue()

    return {
        "safetensors": {"model.safetensors": whole},
        # Widths that differ, as in models people do use: the index says what the files are called.
        "safetensors in shards": sharded(
            "model.safetensors",
            [f"model-0000{i}-of-000002.safetensors" for i in (1, 2)],
            [safetensors.torch.save(part) for part in parts],
        ),
        "bin": {"pytorch_model.bin": torch_saved(tensors)},
        "bin in shards": sharded(
            "pytorch_model.bin",
            [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)],
            [torch_saved(part) for part in parts],
        ),
    }


# What is downloaded --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "safetensors in shards", "bin", "bin in shards"])
def test_only_the_files_needed_are_downloaded_and_they_open_again_offline(
    form: str,
    hub: Hub,
    env: dict[str, str],
    tmp_path: Path,
    stories: Path,
    small_files: Files,
    weights: Mapping[str, Files],
):
    files = {**small_files, **weights[form]}
    if form.startswith("safetensors"):
        files |= weights["bin"] | weights["bin in shards"]
    if form == "safetensors":  # of an earlier version of the repository
        index = "model.safetensors.index.json"
        files[index] = weights["safetensors in shards"][index]
    hub.repositories[NAME] = [Repository(files)]
    result = command("convert", NAME, tmp_path / "converted", env=env)
    assert result.returncode == 0, result.stderr
    assert "Fetching" not in result.stderr
    assert hub.downloaded() == sorted(BESIDE | set(weights[form]))
    assert {request.token for request in hub.asked} == {f"Bearer {TOKEN}"}
    assert tensor_bytes(tmp_path / "converted") == tensor_bytes(stories)
    assert {file.name for file in (tmp_path / "converted").iterdir()} == BESIDE | {"model.safetensors", MANIFEST}
    (snapshot,) = (tmp_path / "home" / "hf" / "hub").glob("models--*/snapshots/*")
    assert {file.name for file in snapshot.iterdir()} == BESIDE | set(weights[form])

    asked = len(hub.asked)
    assert found(NAME, env=env | {"HF_HUB_OFFLINE": "1"}) == [str(snapshot)]
    assert len(hub.asked) == asked


def test_what_is_in_the_cache_is_not_downloaded_again_and_opens_without_a_network(
    hub: Hub, env: dict[str, str], small_files: Files, weights: Mapping[str, Files]
):
    hub.repositories[NAME] = [Repository({**small_files, **weights["safetensors"]})]
    (folder,) = found(NAME, env=env)
    asked = len(hub.asked)
    assert found(NAME, NAME, env=env) == [folder, folder]
    assert [request[:3] for request in hub.asked[asked:]] == [("GET", "revision", "main")] * 2
    assert found(NAME, env=env | {"HF_ENDPOINT": unreachable()}) == [folder]


def test_a_revision_follows_an_at_sign(hub: Hub, env: dict[str, str], small_files: Files, weights: Mapping[str, Files]):
    files = {**small_files, **weights["safetensors"]}
    other = files | {"config.json": json.dumps(json.loads(files["config.json"]) | {"rms_norm_eps": 0.25}).encode()}
    hub.repositories[NAME] = [Repository(files), Repository(other, revision="refs/pr/1")]
    result = command("inspect", f"{NAME}@refs/pr/1", "--json", env=env)
    assert json.loads(result.stdout)["config"]["norm_eps"] == 0.25
    assert {request.revision for request in hub.asked if request.what == "revision"} == {"refs/pr/1"}


@pytest.mark.parametrize("form", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_is_downloaded_and_then_its_base(
    form: str,
    hub: Hub,
    env: dict[str, str],
    tmp_path: Path,
    stories: Path,
    small_files: Files,
    weights: Mapping[str, Files],
):
    base = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, lora)
    adapted.save_pretrained(tmp_path / "saved", safe_serialization=form.endswith("safetensors"))
    files = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    settings = json.loads(files["adapter_config.json"]) | {"base_model_name_or_path": NAME}
    files |= {"adapter_config.json": json.dumps(settings).encode(), "optimizer.pt": b"", "README.md": b"ours"}
    hub.repositories["herd/adapter"] = [Repository(files)]
    hub.repositories[NAME] = [Repository({**small_files, **weights["safetensors"]})]
    result = command("convert", "herd/adapter", tmp_path / "merged", env=env)
    assert result.returncode == 0, result.stderr
    expected = ["README.md", "adapter_config.json", form, *BESIDE, "model.safetensors"]
    assert hub.downloaded() == sorted(expected)
    merged = adapted.merge_and_unload().state_dict()
    for name, tensor in safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors").items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [NAME, f"{NAME}@main"])
def test_a_local_folder_comes_before_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)
    (Path(name) / "config.json").write_text("{}")
    assert find_checkpoint_folder(name) == Path(name)


# What is not --------------------------------------------------------------------------------


def unreachable() -> str:
    """An endpoint where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_a_download_that_breaks_is_refused_until_it_is_whole(
    hub: Hub,
    env: dict[str, str],
    tmp_path: Path,
    stories: Path,
    small_files: Files,
    weights: Mapping[str, Files],
):
    shards = weights["safetensors in shards"]
    repository = Repository({**small_files, **shards}, breaks=[*shards][-1])
    hub.repositories[NAME] = [repository]
    assert_refused(command("inspect", NAME, env=env), f"{NAME} is not a local folder, and the Hub did not give it: ")
    ((problem, _),) = found(NAME, env=env | {"HF_HUB_OFFLINE": "1"})
    assert "offline mode finds no complete copy" in problem
    repository.breaks = None
    result = command("convert", NAME, tmp_path / "converted", env=env)
    assert result.returncode == 0, result.stderr
    assert tensor_bytes(tmp_path / "converted") == tensor_bytes(stories)


GATED = {"X-Error-Code": "GatedRepo"}
SMALL = {"config.json": b"{}"}
REFUSALS: dict[str, tuple[str, Repository | None, str, str]] = {
    "gated, without a token": (
        "herd/gated",
        Repository(SMALL, refuse_files=(401, GATED)),
        "only to those who have accepted its license",
        "/herd/gated, and set HF_TOKEN",
    ),
    "gated, licence not accepted": (
        "herd/closed",
        Repository(SMALL, refuse_files=(403, GATED)),
        "only to those who have accepted its license",
        "Accept it on http://127.0.0.1:",
    ),
    "unknown": ("herd/unknown", None, "the Hub shows you no such model", "Check the name"),
    "unknown, or private, without a token": (
        "herd/private",
        Repository(SMALL, refuse_info=(401, {"X-Error-Code": "RepoNotFound"})),
        "the Hub shows you no such model",
        "if it is private or gated, set HF_TOKEN",
    ),
    "wrong token": (
        "herd/token",
        Repository(SMALL, refuse_info=(401, {"X-Error-Message": "Invalid credentials in Authorization header"})),
        "the Hub refused it",
        "Set HF_TOKEN to a valid token",
    ),
    "token without the right": (
        "herd/right",
        Repository(SMALL, refuse_files=(403, {})),
        "the Hub refused it",
        "Set HF_TOKEN to a valid token",
    ),
    "unknown revision": ("herd/plain@v9", Repository(SMALL), "no revision v9", "branches and tags"),
    "out of order": ("herd/down", Repository(SMALL, refuse_info=(503, {})), "did not give it: ", "try again"),
    "not a possible name": ("herd/a--b", None, "did not give it: ", "Check the name"),
    "another format": ("herd/gguf", Repository({"model.gguf": b"?"}), "has no config.json", "Hub name"),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """The problem and the advice of each refusal, all out of one process."""
    names = [name for name, *_ in REFUSALS.values()]
    with serving() as hub:
        for name, repository, *_ in REFUSALS.values():
            if repository is not None:
                hub.repositories[name.partition("@")[0]] = [repository]
        env = child_env(hub, tmp_path_factory.mktemp("home"))
        return dict(zip(names, found(*names, env=env), strict=True))


@pytest.mark.parametrize(("name", "repository", "about", "way_out"), REFUSALS.values(), ids=REFUSALS)
def test_what_the_hub_refuses_is_one_line_with_the_name_and_the_way_out(
    name: str,
    repository: Repository | None,
    about: str,
    way_out: str,
    refused: Mapping[str, tuple[str, str]],
):
    problem, advice = refused[name]
    assert problem.startswith(name.partition("@")[0])
    assert about in problem
    assert way_out in advice
    assert "\n" not in problem + advice


def test_a_name_that_is_not_in_the_cache_is_refused_offline_and_without_a_network(hub: Hub, env: dict[str, str]):
    hub.repositories[NAME] = [Repository(SMALL)]
    ((problem, advice),) = found(NAME, env=env | {"HF_HUB_OFFLINE": "1"})
    assert f"{NAME} is not a local folder, and offline mode finds no complete copy of it in {env['HF_HOME']}" in problem
    assert "without HF_HUB_OFFLINE" in advice
    ((problem, advice),) = found(NAME, env=env | {"HF_ENDPOINT": unreachable()})
    assert problem == f"{NAME} is not a local folder, and the Hub cannot be reached: Connection refused"
    assert advice.startswith("Check the path. If it is a name on the Hub, check the network;")
    assert hub.asked == []


def test_a_cache_that_cannot_be_written_is_named(hub: Hub, env: dict[str, str], tmp_path: Path, small_files: Files):
    hub.repositories[NAME] = [Repository(small_files)]
    (tmp_path / "file").touch()
    result = command("inspect", NAME, env=env | {"HF_HOME": str(tmp_path / "file")})
    assert_refused(result, str(tmp_path / "file"))
    assert "the Hub" not in result.stderr
