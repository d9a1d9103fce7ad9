"""Stage method: what a preset stands for, as a file that training depends on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from entrograd.errors import InputError
from entrograd.methods.params import MethodParams
from entrograd.methods.presets import COMPONENTS, PRESETS
from entrograd.methods.resolved import check_resolved, resolve, resolved
from entrograd.pipeline.modules import PACKAGE, SOURCE
from entrograd.storage.hashing import sha256

GTPO = {"name": "gtpo", "weighting": "seed_grpo", "gtpo": {"a2": 0.3}}


def section(**keys: object) -> MethodParams:
    return MethodParams.model_validate(keys or GTPO)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_names_its_own_components_alone(name: str) -> None:
    """Their files are those of the registry; a file of another component is not among them."""
    content = resolved(section(name=name))
    components, code = content["components"], content["code"]
    assert isinstance(components, dict)
    assert isinstance(code, dict)
    assert {key: part["name"] for key, part in components.items()} == PRESETS[name]._asdict()
    files = {
        (choice, other): path.partition(":")[0].replace(".", "/") + ".py"
        for choice, paths in COMPONENTS.items()
        for other, path in paths.items()
    }
    used = {files[choice, other] for choice, other in PRESETS[name]._asdict().items()}
    assert used <= code.keys()
    for file, digest in code.items():
        assert digest == sha256(SOURCE / file)
    texts = [(SOURCE / file).read_text() for file in used]
    for file in code.keys() & set(files.values()) - used:  # a loss may be built on another's
        folder, name = Path(file).parent, Path(file).stem
        module = ".".join(folder.parts)
        spellings = (f"from {module} import {name}\n", f"from {module}.{name} import ")
        assert any(spelling in text for text in texts for spelling in spellings)


def test_parameters_are_whole_and_an_infinite_one_is_text() -> None:
    content = resolved(section())
    assert isinstance(content["components"], dict)
    advantage = content["components"]["advantage"]
    assert advantage["a1"] == 1.0  # the default
    assert advantage["a2"] == 0.3
    encore = resolved(section(name="encore", encore={"tau": float("inf")}))
    assert isinstance(encore["components"], dict)
    assert encore["components"]["reward"]["tau"] == "inf"


def test_training_refuses_the_file_of_another_method(tmp_path: Path) -> None:
    file = tmp_path / "method.json"
    assert resolve(section(), file) == "gtpo (weighting: seed_grpo)"
    check_resolved(section(), file)
    with pytest.raises(InputError, match=r"method\.json: is not .* \(changed: components\); run"):
        check_resolved(section(name="gtpo", weighting="seed_grpo", gtpo={"a2": 0.2}), file)
    content = json.loads(file.read_text())
    content["code"]["entrograd/methods/batch.py"] = "0" * 64
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"\(changed: code\)"):
        check_resolved(section(), file)
    file.write_text("[]")
    with pytest.raises(InputError, match="changed: name, components, estimator, code"):
        check_resolved(section(), file)


def test_an_edit_to_the_code_between_the_two_stages_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC hashed the file of the code before: what is trained now would be recorded as its."""
    resolve(section(), tmp_path / "method.json")
    edited = tmp_path / "gtpo.py"
    edited.write_text((PACKAGE / "methods/advantage/gtpo.py").read_text() + "# edited\n")

    def hashes_of(files: list[Path]) -> dict[str, str]:
        return {str(f): sha256(edited if f.name == "gtpo.py" else f) for f in files}

    monkeypatch.setattr("entrograd.methods.resolved.hashes_of", hashes_of)
    with pytest.raises(InputError, match="changed: code"):
        check_resolved(section(), tmp_path / "method.json")
