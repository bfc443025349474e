"""What all defenses have in common: the model they wrap and what they declare."""

from torch import nn


class Defense(nn.Module):
    """A model behind a defense. Wrapping changes neither weights nor mode of the model.

    A subclass says by class attributes whether the same image always gets the same answer (`deterministic`),
    whether the label is kept (`keeps_label`), and whether an image's answer is independent of its batch
    (`rowwise`). A wrapped model that is not deterministic or not rowwise passes that on. Its `forward` maps images to
    scores (N, K) of the kind that the model gives.

    One whose settings can be found on held-out images has a static `fit(scores, labels, *, ...)`, which gives an object
    with what it found, and a class method `from_fit(model, found)`.
    """

    deterministic: bool = True
    keeps_label: bool = False
    rowwise: bool = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.output: str = getattr(model, "output", "logits")
        self.deterministic = self.deterministic and getattr(model, "deterministic", True)
        self.rowwise = self.rowwise and getattr(model, "rowwise", True)

    def extra_repr(self) -> str:
        declared = ("training", "output", "deterministic", "keeps_label", "rowwise")
        plain = {k: v for k, v in vars(self).items() if isinstance(v, int | float | str) and k not in declared}
        return ", ".join(f"{k}={v!r}" for k, v in plain.items() if not k.startswith("_"))
