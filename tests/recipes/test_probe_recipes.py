"""Recipes of probes: the command that each names builds a model that its data agree with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from recipe_builds import build

from hybridvl.data.probes.probe import Probe
from hybridvl.training.agreement import check_agreement

ROOT = Path(__file__).parents[2]
FILES = {path.stem: path for path in sorted((ROOT / "recipes" / "probes").glob("*.yaml"))}
COMMANDS = {
    name: re.search(r"#   hybridvl fit((?: --config recipes/probes/\w+\.yaml)+)$", path.read_text(), re.M)
    for name, path in FILES.items()
}
RUN = {name: command[1].split() for name, command in COMMANDS.items() if command}


def test_what_has_no_command_is_shared() -> None:
    used = {Path(argument).stem for arguments in RUN.values() for argument in arguments[1::2]}
    assert used == set(FILES)
    assert {"associative_recall", "page_order"} <= set(RUN)


@pytest.mark.parametrize("name", RUN)
def test_a_recipe_builds_and_its_samples_fit(name: str) -> None:
    arguments = [str(ROOT / part) if part.endswith(".yaml") else part for part in RUN[name]]
    assert arguments[-1] == str(FILES[name])
    built = build(*arguments)
    net, data = built.model.net, built.datamodule
    assert {parameter.device.type for parameter in net.parameters()} == {"meta"}
    assert 150_000 < net.num_params < 350_000
    check_agreement(built.model.config, data)
    assert built.config.fit.run.name == name
    assert isinstance(data.task, Probe)
    for split in ("train", "val", "test"):
        source, encode = data.source(split), data._encoder()
        assert all(len(encode(source.sample(index, 0))) <= data.max_tokens for index in range(20))


def test_every_probe_has_a_recipe() -> None:
    shown = {yaml.safe_load(FILES[name].read_text())["data"]["task"]["class_path"] for name in RUN}
    folder = ROOT / "hybridvl" / "data" / "probes"
    probes = {
        f"hybridvl.data.probes.{path.stem}.{name}"
        for path in folder.glob("*.py")
        for name in re.findall(r"^class ([A-Z]\w+)\((?:Probe\[|_Copying|InContextRecall)", path.read_text(), re.M)
    }
    assert len(probes) == 9
    assert shown == probes
