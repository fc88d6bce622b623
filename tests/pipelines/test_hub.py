"""Loading from and pushing to a Hub: a small server on this machine that speaks the Hub's protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from hf_ifsq import IFSQARPipeline, IFSQDiTPipeline


COMMIT = "0" * 40

LOAD = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline
import hf_ifsq
class_name, repo_id, file = sys.argv[1:]
pipeline_class = getattr(hf_ifsq, class_name)
for loader in (DiffusionPipeline, pipeline_class):
    pipeline = loader.from_pretrained(repo_id)
    assert type(pipeline) is pipeline_class
    np.save(file, pipeline(1, generator=torch.Generator().manual_seed(0), output_type="np").images)
"""


class Handler(BaseHTTPRequestHandler):
    """Serves the files below `self.server.root / user / repo`."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.answer(json.dumps(self.info("/".join(parts[2:4]), tree="tree" in parts)).encode())
        elif len(parts) > 4 and parts[2] == "resolve":
            path = Path(self.server.root, *parts[:2], *parts[4:])
            self.answer(path.read_bytes() if path.is_file() else None)
        else:
            self.answer(None)

    def info(self, repo_id, tree):
        files = sorted(path for path in (self.server.root / repo_id).rglob("*") if path.is_file())
        names = [path.relative_to(self.server.root / repo_id).as_posix() for path in files]
        if tree:
            return [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": COMMIT}
                for name, path in zip(names, files)
            ]
        return {"id": repo_id, "sha": COMMIT, "tags": [], "siblings": [{"rfilename": name} for name in names]}

    def answer(self, content):
        self.send_response(200 if content is not None else 404)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        content = content or b""
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """Address of the server and the folder that it serves."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root = tmp_path / "hub"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", server.root
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["ar", "dit"])
def test_load_from_the_hub(hub, make_autoencoder, make_ar, make_dit, tmp_path, kind):
    address, root = hub
    tokenizer = make_autoencoder(levels=(5, 3), sample_size=(12, 16))
    if kind == "ar":
        pipeline = IFSQARPipeline(make_ar(vocab_sizes=[5, 3]), tokenizer)
    else:
        transformer = make_dit(sample_size=(3, 4), in_channels=2)
        pipeline = IFSQDiTPipeline(transformer, tokenizer, FlowMatchEulerDiscreteScheduler())
    pipeline.save_pretrained(root / "someone" / kind)
    expected = pipeline(1, generator=torch.Generator().manual_seed(0), output_type="np").images

    file = tmp_path / "images.npy"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", LOAD, type(pipeline).__name__, f"someone/{kind}", str(file)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    np.testing.assert_array_equal(np.load(file), expected)
