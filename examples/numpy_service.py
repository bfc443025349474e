"""onnxruntime and NumPy, without torch and queryfoil: `python numpy_service.py NETWORK.onnx IMAGES.npy`.

`queryfoil export scores protection.py --fit fit.json --to numpy` writes protection.py, elsewhere or once.
"""

import sys
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from protection import protect  # type: ignore[import-not-found]  # the protection: logits in, logits out


def answer(session: onnxruntime.InferenceSession, images: NDArray[np.float32]) -> NDArray[Any]:
    """Shown logits (N, K)."""
    (logits,) = session.run(None, {session.get_inputs()[0].name: images})
    shown: NDArray[Any] = protect(logits)
    return shown


if __name__ == "__main__":
    print(answer(onnxruntime.InferenceSession(sys.argv[1]), np.load(sys.argv[2])).argmax(1))
