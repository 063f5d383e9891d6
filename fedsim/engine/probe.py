"""Does another process, or machine, compute the same bits as this one? A short training run tells."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fedsim import tree


def probe(device: str = "cpu") -> str:
    """Hash of a small network after three steps of training.

    It has what was seen to differ between kinds of processors, numbers of threads and settings of the libraries:
    convolutions, products of odd sizes, SiLU, sigmoid, softplus.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Conv2d(3, 7, 3), nn.SiLU(), nn.Conv2d(7, 11, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(11 * 36, 13)
        ).to(device)
        x, y = torch.randn(9, 3, 10, 10).to(device), (torch.arange(9) % 13).to(device)
    with torch.enable_grad():
        for _ in range(3):
            loss = F.cross_entropy(F.softplus(net(x)), y)
            grads = torch.autograd.grad(loss, list(net.parameters()))
            with torch.no_grad():
                for p, g in zip(net.parameters(), grads, strict=True):
                    p.sub_(0.1 * g)
    return tree.sha256([p.detach().cpu() for p in net.parameters()])
