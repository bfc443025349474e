"""The examples of protected services: each answers as the protected network does, and no other way."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import queryfoil as qf
from queryfoil.deploy.export import export

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A fit, images, and what the protected network shows for them: another confidence than the network's own."""
    network, held_out = qf.models.load("fashion-resnet"), qf.data.load("fashion-mnist", "calibration")
    with torch.inference_mode():
        found = qf.fit(network(held_out.images), held_out.labels, objective="greedy")
        path = tmp_path_factory.mktemp("fit") / "fit.json"
        found.save(path)
        x = qf.data.load("fashion-mnist", "attack")[:5].images
        shown, raw = qf.protect(network, found)(x).softmax(1), network(x).softmax(1)
    assert float((shown - raw).abs().max()) > 0.01
    return SimpleNamespace(fit=path, x=x, shown=shown, network=network)


@pytest.fixture(autouse=True)
def _fit(served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIT", str(served.fit))


def close(probs: Any, shown: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(np.asarray(probs)).float(), shown, rtol=1e-4, atol=1e-6)


def test_fastapi(served: SimpleNamespace) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    client = testclient.TestClient(example("fastapi_app").app)
    answer = client.post("/predict", json={"images": served.x.tolist()}).json()
    close(answer["probabilities"], served.shown)
    assert answer["labels"] == served.shown.argmax(1).tolist()
    for bad in ([[[[2.0]]]], [[[[0.5, 0.5], [0.5]]]], "no images"):
        refused = client.post("/predict", json={"images": bad})
        assert refused.status_code == 422


def test_litserve(served: SimpleNamespace) -> None:
    pytest.importorskip("litserve")
    api = example("litserve_app").Classifier(max_batch_size=64)
    api.setup("cpu")
    batch = api.batch([api.decode_request({"image": image.tolist()}) for image in served.x])
    answers = [api.encode_response(output) for output in api.unbatch(api.predict(batch))]
    close([answer["probabilities"] for answer in answers], served.shown)
    assert [answer["label"] for answer in answers] == served.shown.argmax(1).tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what BentoML imports
def test_bentoml(served: SimpleNamespace) -> None:
    pytest.importorskip("bentoml")
    answer = example("bentoml_app").Classifier.inner().predict(served.x.numpy())
    close(answer["probabilities"], served.shown)


def test_triton_by_a_stand_in_for_its_interface(served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton itself has the module that the backend imports; here are the names of it that are used."""
    interface: Any = ModuleType("triton_python_backend_utils")
    interface.get_input_tensor_by_name = lambda request, name: request[name]
    interface.Tensor = SimpleNamespace(
        from_dlpack=lambda name, capsule: SimpleNamespace(name=name, values=torch.from_dlpack(capsule))
    )
    interface.InferenceResponse = lambda tensors: tensors
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", interface)
    model = example("triton/model").TritonPythonModel()
    model.initialize({"model_repository": "/models/protected", "model_version": "1"})
    parts = [{"images": SimpleNamespace(to_dlpack=part.__dlpack__)} for part in served.x.split([2, 3])]
    responses = model.execute(parts)
    assert [tensor.name for (tensor,) in responses] == ["probabilities"] * 2
    close(torch.cat([tensor.values for (tensor,) in responses]), served.shown)
    config = (EXAMPLES / "triton/config.pbtxt").read_text()
    assert 'name: "images"' in config
    assert 'name: "probabilities"' in config


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # inside torch's exporter
def test_onnxruntime(served: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    path = tmp_path / "network.onnx"
    torch.onnx.export(served.network, (served.x[:2],), path, dynamic_shapes=({0: "batch"},), dynamo=True, verbose=False)
    shown = example("onnxruntime_app").Protected(str(path))(served.x.numpy())
    close(torch.from_numpy(shown).softmax(1), served.shown)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # inside torch's exporter
def test_numpy_alone(served: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    network = tmp_path / "network.onnx"
    torch.onnx.export(
        served.network, (served.x[:2],), network, dynamic_shapes=({0: "batch"},), dynamo=True, verbose=False
    )
    export(None, qf.load_fit(served.fit), tmp_path / "protection.py", to="numpy")
    np.save(tmp_path / "x.npy", served.x.numpy())
    code = (
        "import sys, runpy; sys.modules.update({'torch': None, 'queryfoil': None})\n"
        f"sys.argv = ['service', {str(network)!r}, 'x.npy']; sys.path.insert(0, '.')\n"
        f"names = runpy.run_path({str(EXAMPLES / 'numpy_service.py')!r}, run_name='__main__')\n"
        "import numpy, onnxruntime\n"
        "numpy.save('shown.npy', names['answer'](onnxruntime.InferenceSession(sys.argv[1]), numpy.load('x.npy')))\n"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str(served.shown.argmax(1).numpy())
    close(torch.from_numpy(np.load(tmp_path / "shown.npy")).softmax(1), served.shown)


@pytest.mark.parametrize(
    "name", ["fastapi_app", "litserve_app", "bentoml_app", "triton/model", "onnxruntime_app", "numpy_service"]
)
def test_the_protection_is_a_few_lines(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert 1 <= sum("qf.load_fit" in line or "# the protection" in line for line in text.splitlines()) <= 3
