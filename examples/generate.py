"""Generation: requests of different lengths share a batch and a cache of pages; each token is checked against no cache at all.

    python examples/generate.py [--device auto] [--requests 6] [--rows 3] [--tokens 24] [--quick] [--no-compile]

A small Parallax language model over bytes with random weights. A request takes a free row of the batch; its prompt is read in
chunks (prefill), then every step makes one token of every row (decode). Both are one call of ``model.decode``: new
keys go to the request's pages as they are attended to. On a GPU the step is a CUDA graph, replayed while the lengths
on the device grow. At the end each request's tokens are compared with those of the model's ordinary forward, which
has no cache.

Exits with 1 when a token differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from language_model import LanguageModel
from torch import Tensor, nn

import parallax_compile as plx

PAGE = 16
CHUNK = 32


@dataclass
class Request:
    """A prompt, how many tokens are wanted, and what was made of it."""

    prompt: list[int]
    wanted: int
    made: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


class PagedCache:
    """Pages of keys and values for every layer, and which of them belong to which row of the batch."""

    def __init__(
        self, model: LanguageModel, pages: int, rows: int, most_pages: int, device: str, dtype: torch.dtype
    ) -> None:
        attention = model.blocks[0].attention
        shape = (pages, PAGE, attention.num_kv_heads, attention.head_dim)
        self.layers = [tuple(torch.zeros(2, *shape, device=device, dtype=dtype).unbind(0)) for _ in model.blocks]
        self.free = list(range(pages))
        self.table = torch.full((rows, most_pages), -1, dtype=torch.int32, device=device)

    def take(self, request: Request, row: int) -> None:
        """Give ``row`` the pages that ``request`` will need."""
        count = -(-(len(request.prompt) + request.wanted) // PAGE)
        if count > len(self.free) or count > self.table.size(1):
            raise RuntimeError(f"{count} pages are needed, {len(self.free)} are free")
        request.pages, self.free = self.free[:count], self.free[count:]
        self.table[row] = -1
        self.table[row, :count] = torch.tensor(request.pages, dtype=torch.int32)

    def give_back(self, request: Request, row: int) -> None:
        """The row's pages are free again. A row without pages and keys takes part in a step and changes nothing."""
        self.free += request.pages
        self.table[row] = -1


class Engine:
    """Runs requests on the rows of a batch."""

    def __init__(self, model: LanguageModel, rows: int, cache: PagedCache, device: str, compiled: bool) -> None:
        self.cache, self.rows, self.device = cache, rows, device
        self.call: Callable[..., Tensor] = model.decode
        if compiled:
            self.call = torch.compile(model.decode, fullgraph=True, dynamic=False)
        # What a step reads and writes stays where it is, so that a CUDA graph of it can be replayed.
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self.active = torch.zeros(rows, dtype=torch.int32, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def _step(self) -> None:
        logits = self.call(self.tokens, self.cache.layers, self.lengths, self.cache.table)
        self.tokens.copy_(logits.argmax(-1))
        self.lengths.add_(self.active)

    def warm_up(self) -> None:
        """Compile; on a GPU record the step. No row has a page yet, so that nothing is written."""
        self.prefill([0], 0)
        for _ in range(2):
            self._step()
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()
        self.tokens.zero_()
        self.lengths.zero_()

    def prefill(self, prompt: list[int], row: int) -> int:
        """Read a prompt in chunks; its first token."""
        table = self.cache.table[row : row + 1].clone()
        for start in range(0, len(prompt), CHUNK):
            piece = prompt[start : start + CHUNK]
            # The last chunk is filled up: what it writes behind the prompt is overwritten, and its rows are not read.
            tokens = torch.tensor([piece + [0] * (CHUNK - len(piece))], device=self.device)
            lengths = torch.tensor([start], dtype=torch.int32, device=self.device)
            logits = self.call(tokens, self.cache.layers, lengths, table)
        return int(logits[0, len(piece) - 1].argmax())

    def run(self, requests: list[Request]) -> int:
        """Serve every request; the number of steps."""
        waiting, running, steps = list(requests), {}, 0
        while waiting or running:
            for row in range(self.rows):
                if row not in running and waiting:
                    request = running[row] = waiting.pop(0)
                    self.cache.take(request, row)
                    request.made.append(self.prefill(request.prompt, row))
                    self.tokens[row], self.lengths[row], self.active[row] = request.made[-1], len(request.prompt), 1
            for row, request in list(running.items()):
                if len(request.made) >= request.wanted:
                    self.cache.give_back(request, row)
                    self.lengths[row], self.active[row] = 0, 0
                    del running[row]
            if not running:
                continue
            if self.graph is not None:
                self.graph.replay()
            else:
                self._step()
            steps += 1
            made = self.tokens.flatten().tolist()
            for row, request in running.items():
                request.made.append(made[row])
        return steps


def differing(model: LanguageModel, request: Request, device: str) -> int:
    """How many tokens are not those of the model without a cache."""
    tokens = torch.tensor([request.prompt + request.made], device=device)
    with torch.compiler.set_stance("force_eager"):  # the forward without the compiler: attention is the dense reference
        logits = model(tokens[:, :-1])
    want = logits.argmax(-1)[0, len(request.prompt) - 1 :]
    return int((want != tokens[0, len(request.prompt) :]).sum())


def main() -> int:
    """Serve, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--rows", type=int, default=3, help="requests that run at once")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of the longest request")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--no-compile", action="store_true", help="the uncompiled reference of every call")
    parser.add_argument("--quick", action="store_true", help="a model of one layer")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    width, layers = (32, 1) if arguments.quick else (arguments.width, arguments.layers)
    text = Path(__file__).read_bytes()
    requests = [
        Request(list(text[17 * i : 17 * i + 5 + 13 * i]), max(1, arguments.tokens - 5 * (i % 3)))
        for i in range(arguments.requests)
    ]
    longest = max(len(request.prompt) + request.wanted for request in requests)
    model = LanguageModel(spec=plx.PARALLAX, width=width, layers=layers, heads=arguments.heads, context=longest).to(
        device
    )
    for parameter in (model.head.weight, *(block.attention.r_proj.weight for block in model.blocks)):
        nn.init.normal_(parameter, std=width**-0.5)  # they start at zero, which would make every token the same
    most_pages = -(-longest // PAGE)
    cache = PagedCache(model, arguments.rows * most_pages, arguments.rows, most_pages, device, torch.float32)
    with torch.no_grad():
        engine = Engine(model, arguments.rows, cache, device, not arguments.no_compile)
        start = time.perf_counter()
        engine.warm_up()
        ready = time.perf_counter()
        steps = engine.run(requests)
        spent = time.perf_counter() - ready
        wrong = [differing(model, request, device) for request in requests]
    count = sum(len(request.made) for request in requests)
    print(f"{len(requests)} requests of {min(map(len, (r.prompt for r in requests)))} to {longest} tokens on {device}")
    print(f"{count} tokens in {steps} steps, {count / spent:.0f} tokens/s (ready after {ready - start:.1f} s)")
    for number, request in enumerate(requests):
        print(f"  request {number}: prompt {len(request.prompt)}, made {len(request.made)}, {wrong[number]} differ")
    print("tokens equal those of the uncached reference" if not any(wrong) else "TOKENS DIFFER")
    return 1 if any(wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
