"""The files of deploy/: a manifest that KServe takes, and commands that our command line takes."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import kserve
import kubernetes.client
import pytest
import typer
import yaml

from queryfoil import cli

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
MANIFEST = yaml.safe_load((ROOT / "deploy/inferenceservice.yaml").read_text(encoding="utf-8"))


def options(arguments: list[str]) -> dict[str, Any]:
    """What the command line makes of the arguments of `queryfoil serve`; fails if it does not take them."""
    command: Any = typer.main.get_command(cli.app)
    parsed: dict[str, Any] = command.commands["serve"].make_context("serve", list(arguments)).params
    return parsed


def made(content: Any, kind: str) -> Any:
    """An object of KServe's or Kubernetes's client from a part of a manifest; fails if that is not such a part."""
    if listed := re.fullmatch(r"[Ll]ist\[(.*)\]", kind):
        return [made(one, listed[1]) for one in content]
    if mapped := re.fullmatch(r"[Dd]ict[\[(](.*?), (.*)[\])]", kind):
        return {made(key, mapped[1]): made(value, mapped[2]) for key, value in content.items()}
    if kind in ("str", "int", "bool"):
        assert type(content).__name__ == kind, (content, kind)
        return content
    if kind == "object":
        return content
    known = getattr(kserve, kind, None) or getattr(kubernetes.client, kind)
    names = {told: own for own, told in known.attribute_map.items()}
    assert set(content) <= set(names), f"{kind} has no {set(content) - set(names)}"
    return known(**{names[key]: made(value, known.openapi_types[names[key]]) for key, value in content.items()})


def test_kserve_takes_the_manifest_and_knows_all_its_fields() -> None:
    service = made(MANIFEST, "V1beta1InferenceService")
    (container,) = service.spec.predictor.containers
    assert container.name == "kserve-container"
    assert service.api_version == kserve.constants.KSERVE_V1BETA1
    assert service.kind == kserve.constants.KSERVE_KIND_INFERENCESERVICE


def test_a_manifest_with_a_wrong_field_would_be_found() -> None:
    for wrong in ({"minReplica": 1}, {"minReplicas": "1"}, {"containers": [{"image": "x"}]}):
        with pytest.raises((AssertionError, ValueError)):
            made(
                {**MANIFEST, "spec": {"predictor": {**MANIFEST["spec"]["predictor"], **wrong}}},
                "V1beta1InferenceService",
            )


def test_the_manifest_starts_a_server_that_its_probes_and_mounts_fit() -> None:
    predictor = MANIFEST["spec"]["predictor"]
    (container,) = predictor["containers"]
    found = options(container["args"])
    assert str(found["file"]).startswith("/mnt/models/")
    assert found["host"] == "0.0.0.0"
    assert found["name"] == MANIFEST["metadata"]["name"] == found["file"].stem
    (port,) = container["ports"]
    assert port["containerPort"] == found["port"]
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == found["port"]
        assert container[probe]["httpGet"]["path"] in ("/v2/health/ready", "/v2/health/live")
    mounts = {Path(mount["mountPath"]): mount["name"] for mount in container["volumeMounts"]}
    assert {found["token_file"].parent, found["query_log"], Path("/tmp")} == set(mounts)
    assert set(mounts.values()) == {volume["name"] for volume in predictor["volumes"]}
    assert predictor["timeout"] > found["timeout"]
    assert "STORAGE_URI" in {variable["name"] for variable in container["env"]}


def test_the_containers_command_is_one_of_ours() -> None:
    entry, command = (
        json.loads(re.search(rf"^{word} (\[.*\])$", DOCKERFILE, re.M)[1]) for word in ("ENTRYPOINT", "CMD")
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert entry[0] in project["scripts"]
    assert entry[1:] == ["serve"]
    found = options(command)
    assert (found["host"], found["token_file"]) == ("0.0.0.0", None)
    assert re.search(r"^EXPOSE 8080 8081$", DOCKERFILE, re.M)
    assert (found["port"], found["grpc_port"]) == (8080, 8081)
    extras = re.search(r"'\.\[([a-z,]+)\]'", DOCKERFILE)[1].split(",")
    assert set(extras) <= set(project["optional-dependencies"])


def test_what_the_container_copies_is_there_and_not_ignored() -> None:
    kept = [line[1:] for line in (ROOT / "deploy/Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"]
    for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.M):
        for name in line.split():
            assert (ROOT / name).exists()
            assert name in kept


def test_no_token_is_given_on_a_command_line() -> None:
    with pytest.raises(Exception, match="No such option"):
        options(["x.onnx", "--token", "0123456789abcdef"])
