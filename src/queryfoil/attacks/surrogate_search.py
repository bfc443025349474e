"""The architecture-searching surrogate of QueryNet: the network in which PC-DARTS searches.

Xu et al., "PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search" (ICLR 2020).
Every edge of a cell mixes all operations, with weights (alpha) that are learned; a node weighs its edges (beta).
Only a quarter of the channels passes the operations. Nothing is ever discretized: the mixture itself answers.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad

NODES = 4
EDGES = NODES * (NODES + 3) // 2  # node i has the two inputs and all nodes before it
PART = 4  # one channel of so many passes the operations
OPERATIONS = 8  # none, max pool, average pool, skip, separable 3x3 and 5x5, dilated 3x3 and 5x5


def _norm(channels: int) -> nn.BatchNorm2d:
    """By the statistics of the batch at hand, also for candidates, as in the release."""
    return nn.BatchNorm2d(channels, affine=False, track_running_stats=False)


def _pointwise(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), _norm(c_out))


def _depthwise(c: int, kernel: int, stride: int, dilation: int = 1) -> nn.Sequential:
    """A convolution of each channel with itself, then one across channels."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(c, c, kernel, stride, padding, dilation, groups=c, bias=False),
        nn.Conv2d(c, c, 1, bias=False),
        _norm(c),
    )


class Halve(nn.Module):
    """Half the resolution without losing values: every second one, and those beside, half the channels each."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(c_in, c_out // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(c_in, c_out - c_out // 2, 1, 2, bias=False)
        self.norm = _norm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        beside = pad(x[:, :, 1:, 1:], (0, 1, 0, 1))
        scaled: Tensor = self.norm(torch.cat([self.even(x), self.odd(beside)], 1))
        return scaled


class Edge(nn.Module):
    """A mixture of all operations on a quarter of the channels; the others go by, and all are shuffled."""

    def __init__(self, c: int, stride: int) -> None:
        super().__init__()
        self.stride, self.part = stride, c // PART
        c = self.part
        self.operations = nn.ModuleList(  # all but "none", which is zero
            [
                nn.Sequential(nn.MaxPool2d(3, stride, 1), _norm(c)),
                nn.Sequential(nn.AvgPool2d(3, stride, 1, count_include_pad=False), _norm(c)),
                nn.Identity() if stride == 1 else Halve(c, c),
                nn.Sequential(_depthwise(c, 3, stride), _depthwise(c, 3, 1)),
                nn.Sequential(_depthwise(c, 5, stride), _depthwise(c, 5, 1)),
                _depthwise(c, 3, stride, 2),
                _depthwise(c, 5, stride, 2),
            ]
        )

    def forward(self, x: Tensor, alpha: Tensor) -> Tensor:
        some, others = x[:, : self.part], x[:, self.part :]
        mixed = sum(share * operation(some) for share, operation in zip(alpha[1:], self.operations, strict=True))
        if self.stride == 2:
            others = max_pool2d(others, 2, 2, ceil_mode=True)
        y = torch.cat([mixed, others], 1)
        n, _, h, w = y.shape
        return y.view(n, PART, -1, h, w).transpose(1, 2).reshape(n, -1, h, w)


class Cell(nn.Module):
    """Four nodes, each the weighted sum of its edges from the two last cells and the nodes before; concatenated."""

    def __init__(self, c_before: int, c_last: int, c: int, halves: bool, last_halved: bool) -> None:
        super().__init__()
        self.before = Halve(c_before, c) if last_halved else _pointwise(c_before, c)
        self.last = _pointwise(c_last, c)
        self.nodes = nn.ModuleList(
            nn.ModuleList(Edge(c, 2 if halves and source < 2 else 1) for source in range(node + 2))
            for node in range(NODES)
        )

    def forward(self, before: Tensor, last: Tensor, alphas: Tensor, betas: Tensor) -> Tensor:
        states = [self.before(before), self.last(last)]
        start = 0
        for edges in self.nodes:
            end = start + len(states)
            alpha, beta = alphas[start:end].softmax(1), betas[start:end].softmax(0)
            inputs = zip(beta, edges, states, alpha, strict=True)  # type: ignore[call-overload]
            states.append(sum(share * edge(x, mix) for share, edge, x, mix in inputs))
            start = end
        return torch.cat(states[2:], 1)


class SuperNet(nn.Module):
    """Images in [0, 1] (N, C, H, W) to scores (N, K); cells at one and two thirds halve the resolution.

    width: channels of the first cells, a multiple of 4; the paper's is 16. cells: 6, 8 or 10 in the paper.
    """

    def __init__(self, channels: int, classes: int, width: int, cells: int) -> None:
        super().__init__()
        halving = (cells // 3, 2 * cells // 3)
        self.stem = nn.Sequential(nn.Conv2d(channels, 3 * width, 3, padding=1, bias=False), _norm(3 * width))
        self.cells, self.halves = nn.ModuleList(), [i in halving for i in range(cells)]
        before = last = 3 * width
        for i, halves in enumerate(self.halves):
            width *= 1 + halves
            self.cells.append(Cell(before, last, width, halves, i > 0 and self.halves[i - 1]))
            before, last = last, NODES * width
        self.linear = nn.Linear(last, classes)
        self.alphas = nn.Parameter(1e-3 * torch.randn(2, EDGES, OPERATIONS))  # of cells that keep and halve
        self.betas = nn.Parameter(1e-3 * torch.randn(2, EDGES))

    def forward(self, x: Tensor) -> Tensor:
        before = last = self.stem(x)
        for cell, halves in zip(self.cells, self.halves, strict=True):
            before, last = last, cell(before, last, self.alphas[int(halves)], self.betas[int(halves)])
        scores: Tensor = self.linear(last.mean(dim=(2, 3)))
        return scores

    def architecture(self) -> list[nn.Parameter]:
        """What says which operations and edges count."""
        return [self.alphas, self.betas]

    def weights(self) -> list[nn.Parameter]:
        """All other parameters."""
        return [*self.stem.parameters(), *self.cells.parameters(), *self.linear.parameters()]
