"""What the pages on deployment show works: kustomizations, configurations, source URLs. More: nursery_tests/docs."""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshlocal.app.config_loader import load_config
from meshlocal.policy.kubernetes_options import _OPTIONS
from meshlocal.policy.sources import SourceUrl

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "docs" / "kubernetes.md"
MACHINES = ROOT / "docs" / "physical-machines.md"
TOOLS = ROOT / "tools"

pages = pytest.mark.parametrize("page", [KUBERNETES, MACHINES], ids=lambda page: page.stem)


def blocks(page: Any, *languages: Any) -> Any:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def files(page: Any) -> Any:
    """The YAML blocks that begin with a comment that is a path."""
    named = {}
    for text in blocks(page, "yaml"):
        if match := re.match(r"# (/?[\w/.-]+\.yaml)\n", text):
            named[match[1]] = text
    return named


@pytest.fixture(scope="module")
def checker() -> Iterator[Any]:
    sys.path.insert(0, str(TOOLS))
    try:
        import check_manifests

        yield check_manifests
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def mine(tmp_path_factory: Any) -> Any:
    """A tree with the repository's manifests and the page's own files."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "deploy" / "kubernetes", tree / "deploy" / "kubernetes")
    for name, text in files(KUBERNETES).items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    return tree


@pytest.mark.parametrize("folder", ["discovery", "example", "shop"])
def test_the_pages_kustomizations_build_and_keep_the_rules(checker: Any, mine: Any, folder: Any) -> None:
    build = checker.Build(folder, checker.kustomize(mine / "mine" / folder), checker.meshlocal.__version__)
    discovery = checker.kustomize(mine / "mine" / "discovery")
    services = [each for each in (*build.documents, *discovery) if each["kind"] == "Service"]
    build.services = {(each["metadata"]["name"], each["metadata"]["namespace"]): each for each in services}
    found = [line for rule in (*checker.RULES, checker.meshlocal_containers) for line in rule(build)]
    # The namespace that is read is not ours to make.
    assert [line for line in found if "no Namespace shop is in the build" not in line] == []
    problems = [checker.schema_problem(each, version) for each in build.documents for version in checker.versions()]
    assert set(problems) == {None}
    images = {container.spec["image"] for pod in build.pods for container in pod.containers if container.ours}
    prefix = "" if folder == "shop" else "registry.example.com/"
    assert images == {f"{prefix}meshlocal:{checker.meshlocal.__version__}"}


def test_the_variables_for_zones_are_keys() -> None:
    (block,) = (text for text in blocks(KUBERNETES, "yaml") if "PREFER" in text)
    environment = {each["name"]: each.get("value", "z1") for each in yaml.safe_load(block)["env"]}
    proxy = load_config(ROOT / "deploy/kubernetes/example/proxy.yaml", {}, environment, "proxy").proxy
    assert proxy.prefer == ("node", "zone")
    assert proxy.labels == {"zone": "z1"}


def test_every_option_of_the_source_is_explained() -> None:
    section = KUBERNETES.read_text().split("## The source's options")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)=([^`]+)` \|", section, re.MULTILINE)
    assert {name for name, _ in rows} == set(_OPTIONS)
    for name, value in rows:
        SourceUrl.parse(f"kubernetes:?{name}={value}")
    for url in re.findall(r"'(kubernetes:[^']*)'", section):
        SourceUrl.parse(url)


@pages
def test_configurations_are_good(page: Any, tmp_path: Any) -> None:
    for name, text in files(page).items():
        for role in ("proxy", "discovery"):
            if re.search(rf"^{role}:", text, re.MULTILINE):
                file = tmp_path / Path(name).name
                file.write_text(text)
                load_config(file, {}, {}, role)
