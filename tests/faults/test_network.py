"""Two hosts, faked by network namespaces, under torchrun: the cable between them is pulled out for a while, and put back."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from klimb.ranks import ALONE
from klimb.store import load_latest_checkpoint, read_jsonl
from ranked import run


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Names of two network namespaces with a cable between them; its ends are called as they are, at 10.77.0.1 and .2."""
    names = [f"klimb{os.getpid()}{end}" for end in "ab"]
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", "kla", "netns", names[0], "type", "veth", "peer", "klb", "netns", names[1])
        for number, (name, end) in enumerate(zip(names, ("kla", "klb"), strict=True), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    else:
        yield names
    finally:
        for name in made:
            ip("netns", "del", name)


def on(host, number, end, settings):
    """torchrun on one of two hosts."""
    file = Path(settings["output_dir"]).parent / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    there = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-id", "klimb"]
    own = ["--local-addr", f"10.77.0.{number}", "--nnodes", "2", "--nproc-per-node", "1"]
    own += ["--rdzv-conf", f"is_host={int(number == 1)}"]  # the name of this machine leads to neither
    launcher = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run"]
    return subprocess.Popen(
        [*launcher, *there, *own, "-m", "klimb", "train", "-q", "-c", str(file)],
        env={**os.environ, "GLOO_SOCKET_IFNAME": end, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_cable_that_is_pulled_out_and_put_back(hosts, tiny_run, tmp_path):
    settings = {**tiny_run, "max_steps": 8, "save_steps": 2}
    reward = Path(settings["reward_funcs"].partition(":")[0])
    reward.write_text(
        "import time\n" + reward.read_text().replace('"""Share', 'time.sleep(0.2)\n    """Share')
    )
    metrics = Path(settings["output_dir"]) / "metrics.jsonl"
    both = [
        on(host, n, end, settings) for n, (host, end) in enumerate(zip(hosts, ("kla", "klb"), strict=True), 1)
    ]
    try:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and not (metrics.exists() and len(read_jsonl(metrics)) >= 2):
            for process in both:
                assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        ip("-n", hosts[0], "link", "set", "kla", "down")
        time.sleep(0.5)  # what was under way
        before = len(read_jsonl(metrics))
        time.sleep(3)
        assert len(read_jsonl(metrics)) == before < 8  # they wait for each other
        ip("-n", hosts[0], "link", "set", "kla", "up")
        said = [process.communicate(timeout=120)[1] for process in both]
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert [process.returncode for process in both] == [0, 0], said
    assert [record["step"] for record in read_jsonl(metrics)] == list(range(1, 9))
    run(ALONE, {**settings, "output_dir": str(tmp_path / "one")}, "run_train")
    one, two = (load_latest_checkpoint(tmp_path / name / "checkpoints") for name in ("one", "run"))
    assert one.state == two.state
    for name, x in one.tensors.items():
        if name.startswith("weights"):
            assert (x - two.tensors[name]).abs().max() < 1e-4, name
