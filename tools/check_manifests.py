"""Build every kustomization in deploy, and check what comes out: one line for each thing wrong.

Each manifest is checked against the schemas of every Kubernetes version from OLDEST to the newest that
kubernetes-validate carries, strictly, and against the rules of manifest_rules.py and manifest_commands.py. Objects of
cert-manager are checked against tools/schemas/cert-manager.json: what its custom resource definitions (1.21, v1) say of
a `spec`, without the kinds of issuer that nothing here uses; those of the Prometheus operator against
tools/schemas/prometheus-operator.json: the same of its (0.82 and newer, v1), without what has to do with credentials.
Components are built on top of base/discovery.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from kubernetes_validate.utils import all_versions
from manifest_commands import meshlocal_containers
from manifest_rules import RULES, Build

import meshlocal

ROOT = Path(__file__).resolve().parent.parent
MANIFESTS = ROOT / "deploy" / "kubernetes"
MONITORING = ROOT / "deploy" / "monitoring"
BASE = Path("base/discovery")
OLDEST = "1.29"
"""The first version in which a sidecar is an init container without a feature gate."""
SCHEMAS = Path(__file__).resolve().parent / "schemas"
CUSTOM = {"cert-manager.io/v1": "cert-manager.json", "monitoring.coreos.com/v1": "prometheus-operator.json"}
"""Where the schemas of custom resources are, by their API version."""
KUBECTL = Path(sys.executable).with_name("kubectl")


def versions() -> list[str]:
    """Every version from OLDEST on, `1.29` and so on."""
    known = dict.fromkeys(version.rpartition(".")[0] for version in all_versions())
    return list(known)[list(known).index(OLDEST) :]


def kustomize(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl kustomize` makes of a folder.

    Raises:
        ValueError: it says why it cannot.
    """
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=False)
    if done.returncode != 0 or done.stderr:
        raise ValueError(done.stderr.strip().replace("\n", "; "))
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def build_all(manifests: Path) -> tuple[list[Build], list[str]]:
    """Every kustomization's build, and what could not be built."""
    builds, findings = [], []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "manifests")
        shutil.copytree(manifests, copy)
        for file in sorted(copy.rglob("kustomization.yaml")):
            target, name = file.parent, str(file.parent.relative_to(copy))
            if yaml.safe_load(file.read_text())["kind"] == "Component":
                target = copy / "on-base"
                target.mkdir(exist_ok=True)
                wrapper = {"resources": [f"../{BASE}"], "components": [f"../{name}"]}
                (target / "kustomization.yaml").write_text(json.dumps(wrapper))
            try:
                builds.append(Build(name, kustomize(target), meshlocal.__version__))
            except ValueError as error:
                findings.append(f"{name}: cannot be built: {error}")
    if not builds and not findings:
        findings.append(f"{manifests}: no kustomization.yaml")
    services = {
        (service["metadata"]["name"], service["metadata"].get("namespace", "")): service
        for build in builds
        for service in build.of_kind("Service")
    }
    for build in builds:
        build.services = services
    return builds, findings


def build_monitoring() -> tuple[list[Build], list[str]]:
    """deploy/monitoring on top of the discovery server that it watches, likewise."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(MANIFESTS / BASE, Path(folder, "discovery"))
        shutil.copytree(MONITORING, Path(folder, "monitoring"))
        both = {"resources": ["discovery", "monitoring"]}
        Path(folder, "kustomization.yaml").write_text(json.dumps(both))
        try:
            return [Build("monitoring", kustomize(Path(folder)), meshlocal.__version__)], []
        except ValueError as error:
            return [], [f"monitoring: cannot be built: {error}"]


def schema_problem(document: dict[str, Any], version: str) -> str | None:
    """What the schema of the version has against a manifest."""
    if document["apiVersion"] in CUSTOM:
        return _custom_problem(document)
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        place = ".".join(str(step) for step in error.absolute_path)
        return f"{place}: {error.message}" if place else str(error.message)
    except kubernetes_validate.SchemaNotFoundError:
        return f"no {document['kind']} of {document['apiVersion']} is known"
    return None


def _custom_problem(document: dict[str, Any]) -> str | None:
    version = document["apiVersion"]
    schema = json.loads((SCHEMAS / CUSTOM[version]).read_text()).get(document["kind"])
    if schema is None:
        return f"no {document['kind']} of {version} is known"
    for error in jsonschema.Draft7Validator(schema).iter_errors(document.get("spec", {})):
        return f"{'.'.join(['spec', *map(str, error.absolute_path)])}: {error.message}"
    return None


def check(manifests: Path = MANIFESTS) -> tuple[list[str], int]:
    """Every finding, once; and how many manifests there are."""
    builds, findings = build_all(manifests)
    if manifests == MANIFESTS:
        more, others = build_monitoring()
        builds, findings = builds + more, findings + others
    seen: set[str] = set()
    for build in builds:
        for document in build.documents:
            text = json.dumps(document, sort_keys=True)
            if text in seen:
                continue
            seen.add(text)
            problems = {version: schema_problem(document, version) for version in versions()}
            for problem in dict.fromkeys(filter(None, problems.values())):
                those = [version for version, other in problems.items() if other == problem]
                name = f"{document['kind']} {document['metadata']['name']}"
                findings.append(f"{build.name}: {name}: {problem} (Kubernetes {those[0]} to {those[-1]})")
        findings += [f"{build.name}: {line}" for rule in (*RULES, meshlocal_containers) for line in rule(build)]
    return list(dict.fromkeys(findings)), len(seen)


def main() -> None:
    findings, count = check()
    if findings:
        sys.exit("\n".join(findings))
    print(f"manifests are good: {count}, for Kubernetes {versions()[0]} to {versions()[-1]}")


if __name__ == "__main__":
    main()
