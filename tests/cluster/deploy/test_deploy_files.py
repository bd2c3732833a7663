"""The files in cluster/deploy: parsed, checked against schemas, and of one mind with the package and each other.

KubeRay's CRDs are not ours to ship. With SWITCHGEAR_KUBERAY_CRDS set to a folder that has ray.io_rayclusters.yaml and
ray.io_rayservices.yaml (helm-chart/kuberay-operator/crds of a KubeRay checkout), every field is checked against them;
without it against the documented fields listed here.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from switchgear.cli import build_parser
from switchgear.config import settings, split_settings

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "cluster" / "deploy"
# spec fields of KubeRay's v1 API (docs.ray.io, KubeRay API reference) that our manifests may use.
GROUP = {"rayStartParams", "template", "serviceType"}
CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
WORKERS = GROUP - {"serviceType"} | {"groupName", "replicas", "minReplicas", "maxReplicas"}


def documents(name: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all((DEPLOY / name).read_text()) if document]


def ray_cluster(name: str) -> dict[str, Any]:
    (document,) = (d for d in documents(name) if d["kind"].startswith("Ray"))
    spec: dict[str, Any] = document["spec"]
    return spec if document["kind"] == "RayCluster" else spec["rayClusterConfig"]


def service_config() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(documents("rayservice.yaml")[0]["spec"]["serveConfigV2"])
    return config


def strict(schema: Any) -> Any:
    """A CRD's schema as JSON Schema that refuses unknown fields, which Kubernetes would silently drop."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {}
    closed = "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields")
    result = {
        key: {name: strict(part) for name, part in value.items()} if key == "properties" else strict(value)
        for key, value in schema.items()
    }
    return result | ({"additionalProperties": False} if closed else {})


def test_every_file_says_what_was_run() -> None:
    for path in DEPLOY.iterdir():
        text = path.read_text()
        if path.name != "README.md":
            assert re.search(r"^# Run: ", text, re.M) and re.search(r"^# (Not run|Run: nothing)", text, re.M), path.name
        assert path.name == "README.md" or path.name in (DEPLOY / "README.md").read_text()


def test_ray_up_against_rays_schema() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = documents("ray-up.yaml")
    validate_config(prepare_config(config))
    config["no_such_field"] = 1
    with pytest.raises(Exception, match="no_such_field"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize(("name", "plural"), [("raycluster.yaml", "rayclusters"), ("rayservice.yaml", "rayservices")])
def test_manifests_against_kuberays_crds(name: str, plural: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    folder = os.environ.get("SWITCHGEAR_KUBERAY_CRDS")
    if not folder:
        pytest.skip("SWITCHGEAR_KUBERAY_CRDS is not set: see this module's text")
    crd = yaml.safe_load((Path(folder) / f"ray.io_{plural}.yaml").read_text())
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema["properties"]["metadata"] = {"type": "object"}
    (document,) = (d for d in documents(name) if d["kind"] == crd["spec"]["names"]["kind"])
    validator = jsonschema.Draft202012Validator(strict(schema))
    assert [(list(error.path), error.message) for error in validator.iter_errors(document)] == []
    document["spec"]["noSuchField"] = 1
    assert list(validator.iter_errors(document))


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayservice.yaml"])
def test_manifests_use_documented_fields(name: str) -> None:
    for document in documents(name):
        assert {"apiVersion", "kind", "metadata", "spec"} == document.keys()
        assert document["metadata"]["name"] == "switchgear"
        if document["kind"] == "RayService":
            assert document["spec"].keys() == {"serveConfigV2", "rayClusterConfig"}
    cluster = ray_cluster(name)
    assert cluster.keys() <= CLUSTER
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"].keys() <= GROUP
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group.keys() <= WORKERS | GROUP
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["requests"] == container["resources"]["limits"]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        mounts = group["template"]["spec"]["containers"][0]["volumeMounts"]
        assert "/dev/shm" in {mount["mountPath"] for mount in mounts}  # where the ranks' segment goes


def test_versions_agree() -> None:
    """One Ray everywhere, and it is the locked one; one image."""
    lock = (ROOT / "requirements.lock").read_text()
    (ray_version,) = re.findall(r"^ray==(\S+)$", lock, re.M)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{ray_version}-" in dockerfile
    assert f"ray[serve]=={ray_version}" in dockerfile
    for name in ("raycluster.yaml", "rayservice.yaml"):
        cluster = ray_cluster(name)
        assert cluster["rayVersion"] == ray_version
        images = set(re.findall(r"image: (\S+)", (DEPLOY / name).read_text()))
        assert images == {f"REGISTRY/switchgear:{version}"}


def test_the_commands_in_the_files_exist() -> None:
    """Each `switchgear ...` in a file or the README is a command line that the parser takes."""
    found = 0
    for path in DEPLOY.iterdir():
        text = re.sub(r"\\\n#?\s*", " ", path.read_text())
        for command in re.findall(r"(?<![\w/.-])switchgear ((?:serve|plan|run) [^`'\n;|&)]*)", text):
            words = [word for word in shlex.split(command.replace("...", "")) if "$" not in word or word == "$KEY"]
            build_parser().parse_args([word.replace("$KEY", "key") for word in words])
            found += 1
    assert found >= 4


def test_service_arguments_are_settings() -> None:
    (application,) = service_config()["applications"]
    split_settings(application["args"])
    assert application["args"].keys() <= settings().keys()
    module, _, function = application["import_path"].partition(":")
    tree = ast.parse((ROOT / "cluster" / Path(*module.split("."))).with_suffix(".py").read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    (deployment,) = application["deployments"]
    assert f'name="{deployment["name"]}"' in (ROOT / "cluster" / "switchgear" / "ray_serve.py").read_text()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_slurm_script_reads_and_explains_itself() -> None:
    script = DEPLOY / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr


def test_importing_the_package_needs_no_ray_serve() -> None:
    code = "import sys, switchgear.cli; sys.exit('ray.serve' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
