"""Computes what the kernels on tensor cores compute, from their PTX, on a machine without a card, and compares it with numpy.

    EXTRA_FEATURES=cubecl/cuda-cpp,cubecl/persistence tools/gpu-report.sh build cuda
    mkdir ptx
    PTX_DIR=$PWD/ptx BURN_MOE_DTYPE=bf16 BURN_MOE_BATCH=64 tools/cuda-without-a-card/compile.sh kernels target/gpu-report-cuda/kernels --bench experts
    python3 tools/cuda-without-a-card/emulate.py $(grep -lE 'entry (linear|weight_gradient)_kernel.*bf16' ptx/*.ptx)

A small BURN_MOE_BATCH gives narrow tiles. For the way through registers, set `asynchronous` to false in `plan` (src/ops/cube/tensor_cores/mod.rs).

Each warp of a block runs alone until it waits for the others, the first one first,
and, in a second run, the last one first, so that a missing barrier shows. In the first run, copies to shared memory are done when they are waited
for, as late as a card may do them, and in the second at once, as early as it may. Shared memory holds NaN until it is written, and reading or
writing beyond a buffer is an error. Where threads of a warp part, those that are furthest behind go on. Needs numpy.
"""

import math
import re
import sys
import warnings

import numpy as np

WARP = 32
warnings.filterwarnings("ignore", category=RuntimeWarning)


def bf16(values):
    """f32 to bits, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def f32(bits):
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


class Memory:
    """Buffers far from each other, so that every address belongs to one of them or to none."""

    def __init__(self):
        self.buffers = []

    def add(self, array):
        self.buffers.append(array)
        return len(self.buffers) << 32

    def at(self, addresses, size):
        """Bytes at each address, as a view of (buffer, index) pairs: all addresses of one call must be in one buffer."""
        numbers = np.unique(addresses >> np.uint64(32))
        assert len(numbers) == 1 and 0 < numbers[0] <= len(self.buffers), f"no buffer at {addresses[:4]}"
        buffer = self.buffers[int(numbers[0]) - 1].view(np.uint8).reshape(-1)
        index = (addresses & np.uint64(0xFFFFFFFF)).astype(np.int64)
        assert (index + size <= buffer.size).all(), f"beyond a buffer of {buffer.size} bytes: {index.max()}"
        assert (index % size == 0).all(), "not aligned"
        return buffer, index[:, None] + np.arange(size)


class Kernel:
    def __init__(self, text):
        self.name = re.search(r"\.entry (\w+)", text)[1]
        self.threads = int(re.search(r"\.maxntid (\d+)", text)[1])
        self.shared = re.search(r"\.extern \.shared .* (\w+)\[\]", text)[1]
        self.code, self.labels = [], {}
        for line in text[text.index("{", text.index(".maxntid")) :].splitlines():
            line = line.split("//")[0].strip()
            if line.startswith("{"):  # inline assembly
                line = line[1:].removesuffix("}").strip()
            if label := re.fullmatch(r"(\$\w+):", line):
                self.labels[label[1]] = len(self.code)
            elif line.rstrip("};") and not line.startswith("."):
                found = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*?)[;\s]*", line)
                assert found, line
                negated, predicate, name, operands = found.groups()
                parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands)
                self.code.append((negated == "!", predicate, name, parts))

    def run(self, grid, parameters, memory, lazy):
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    Block(self, (x, y, z), parameters, memory, lazy).run()


class Block:
    def __init__(self, kernel, place, parameters, memory, lazy):
        self.kernel, self.parameters, self.memory, self.lazy = kernel, parameters, memory, lazy
        count = kernel.threads
        self.special = {"%tid.x": np.arange(count, dtype=np.uint32), "WARP_SZ": WARP, kernel.shared: 0}
        self.special |= {f"%ctaid.{axis}": value for axis, value in zip("xyz", place)}
        self.registers = {}
        self.shared = np.full(232448, 0xFF, np.uint8)  # NaN, until it is written
        self.pc, self.waiting, self.done = np.zeros(count, np.int64), np.zeros(count, bool), np.zeros(count, bool)
        self.copies, self.groups = {}, {}  # by warp

    # Operands.

    TYPES = {"f32": np.float32, "u16": np.uint16, "b16": np.uint16, "pred": bool}
    TYPES |= {f"{sign}{bits}": getattr(np, f"uint{bits}") for sign in "usb" for bits in (32, 64)}
    KINDS = {"%f": np.float32, "%r": np.uint32, "%rd": np.uint64, "%rs": np.uint16, "%p": bool}

    def register(self, name):
        if name not in self.registers:
            self.registers[name] = np.zeros(self.kernel.threads, self.KINDS[re.match(r"%[a-z]+", name)[0]])
        return self.registers[name]

    def get(self, text, kind):
        if text.startswith("%") and text not in self.special:
            value = self.register(text)[self.mask]
            return value.view(kind) if value.dtype != kind and value.dtype.itemsize == np.dtype(kind).itemsize and kind is not bool else value
        if text in self.special:
            value = self.special[text]
            return (value[self.mask] if isinstance(value, np.ndarray) else np.full(self.mask.size, value)).astype(kind)
        if text.startswith("0f"):
            return np.full(self.mask.size, int(text[2:], 16), np.uint32).view(np.float32)
        return np.full(self.mask.size, int(text, 0)).astype(kind)

    def put(self, name, value):
        register = self.register(name)
        value = np.asarray(value)
        if value.dtype != register.dtype and value.dtype.itemsize == register.dtype.itemsize:
            value = value.view(register.dtype)
        register[self.mask] = value

    def address(self, text):
        base, _, offset = text.strip("[]").partition("+")
        if base == self.kernel.shared or base in self.special:
            return np.full(self.mask.size, int(offset or 0), np.uint64)
        return self.get(base, np.uint32 if re.match(r"%r\d", base) else np.uint64).astype(np.uint64) + np.uint64(int(offset or 0))

    @staticmethod
    def names(text):
        return [part.strip() for part in text.strip("{}").split(",")]

    def warp(self):
        assert self.mask.size == WARP, "part of a warp"
        return int(self.mask[0]) // WARP

    # Running.

    def run(self):
        warps = np.arange(self.kernel.threads).reshape(-1, WARP)
        while not self.done.all():
            for warp in warps if self.lazy else warps[::-1]:
                self.run_warp(warp)
            running = ~self.done
            assert self.waiting[running].all() and len(set(self.pc[running])) <= 1, "threads wait at different barriers"
            self.waiting[:] = False

    def run_warp(self, warp):
        """Until its threads have ended, or wait for those of others."""
        while (ready := warp[~self.done[warp] & ~self.waiting[warp]]).size:
            here = self.pc[ready].min()
            self.mask = ready[self.pc[ready] == here]
            negated, predicate, name, operands = self.kernel.code[here]
            everyone = self.mask
            if predicate:
                self.mask = self.mask[self.register(predicate)[self.mask] ^ negated]
            self.pc[everyone] += 1
            if self.mask.size:
                self.step(name, operands)

    def step(self, name, operands):
        parts = name.split(".")
        kind = self.TYPES.get(parts[-1])
        op = parts[0]
        if op == "ret":
            self.done[self.mask] = True
        elif op == "bra":
            self.pc[self.mask] = self.kernel.labels[operands[0]]
        elif name == "bar.sync":
            self.waiting[self.mask] = True
        elif name == "bar.warp.sync":
            pass
        elif op == "ld" and parts[1] == "param":
            self.put(operands[0], np.full(self.mask.size, self.parameters[operands[1].strip("[]").rpartition("param_")[2]]).astype(kind))
        elif op in ("ld", "st"):
            self.access(op, parts, operands, kind)
        elif op == "cp":
            self.copy(parts, operands)
        elif op == "ldmatrix":
            self.load_matrix("trans" in parts, self.names(operands[0]), self.address(operands[1]))
        elif op == "mma":
            self.multiply(*map(self.names, operands))
        elif op == "shfl":
            self.shuffle(parts[2], operands)
        elif op == "activemask":
            self.put(operands[0], np.full(self.mask.size, 0xFFFFFFFF, np.uint32))
        elif op == "mov" and operands[0].startswith("{"):
            words = self.get(operands[1], np.uint32)
            for half, register in enumerate(self.names(operands[0])):
                self.put(register, (words >> np.uint32(16 * half)).astype(np.uint16))
        elif op == "mov" and operands[1].startswith("{"):
            low, high = (self.get(half, np.uint16).astype(np.uint32) for half in self.names(operands[1]))
            self.put(operands[0], low | high << np.uint32(16))
        elif op == "setp":
            kind = np.int32 if parts[2] == "s32" else kind
            a, b = (self.get(operand, kind) for operand in operands[1:3])
            compared = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b, "ltu": ~(a >= b)}
            self.put(operands[0], compared[parts[1]])
        elif op == "selp":
            self.put(operands[0], np.where(self.register(operands[3])[self.mask], self.get(operands[1], kind), self.get(operands[2], kind)).astype(kind))
        elif op == "cvt":
            source = operands[1]
            if parts[-2:] == ["bf16", "f32"]:
                self.put(operands[0], bf16(self.get(source, np.float32)))
            elif parts[-2:] == ["f32", "bf16"]:
                self.put(operands[0], f32(self.get(source, np.uint16)))
            else:
                self.put(operands[0], self.get(source, self.TYPES[parts[2]]).astype(self.TYPES[parts[1]]))
        else:
            self.arithmetic(op, parts, operands, kind)

    def arithmetic(self, op, parts, operands, kind):
        if parts[1:2] == ["wide"]:
            wide = {np.uint32: np.uint64, np.uint16: np.uint32}[kind]
            a, b = (self.get(operand, kind).astype(wide) for operand in operands[1:3])
            result = a * b + (self.get(operands[3], wide) if op == "mad" else wide(0))
        else:
            values = [self.get(operand, np.uint32 if index == 1 and op in ("shl", "shr") else kind) for index, operand in enumerate(operands[1:])]
            a, b, c, d = values + [None] * (4 - len(values))
            result = {
                "mov": lambda: a, "cvta": lambda: a, "add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b, "mad": lambda: a * b + c,
                "fma": lambda: (a.astype(np.float64) * b + c).astype(np.float32), "min": lambda: np.minimum(a, b), "max": lambda: np.maximum(a, b),
                "and": lambda: a & b, "or": lambda: a | b, "xor": lambda: a ^ b, "not": lambda: ~a, "rem": lambda: a % b, "div": lambda: a // b,
                "shl": lambda: a << b.astype(kind), "shr": lambda: a >> b.astype(kind), "neg": lambda: -a, "abs": lambda: np.abs(a),
                "copysign": lambda: np.copysign(b, a), "ex2": lambda: np.exp2(a), "rcp": lambda: 1 / a,
                "bfi": lambda: self.insert(a, b, c, d),
            }[op]()
        self.put(operands[0], np.asarray(result))

    @staticmethod
    def insert(a, b, start, length):
        mask = (((np.uint32(1) << length) - np.uint32(1)) << start).astype(np.uint32)
        return (b & ~mask) | (a << start & mask)

    def access(self, op, parts, operands, kind):
        names = self.names(operands[0 if op == "ld" else 1])
        size = np.dtype(kind).itemsize
        addresses = self.address(operands[1 if op == "ld" else 0])
        if parts[1] == "shared":
            memory, index = self.shared, addresses.astype(np.int64)[:, None] + np.arange(size * len(names))
        else:
            memory, index = self.memory.at(addresses, size * len(names))
        if op == "ld":
            values = memory[index].view(kind)
            for lane, name in enumerate(names):
                self.put(name, values[:, lane].copy())
        else:
            memory[index] = np.stack([self.get(name, kind) for name in names], 1).view(np.uint8)

    def copy(self, parts, operands):
        if parts[-1].startswith("commit_group"):
            self.groups.setdefault(self.warp(), []).append(self.copies.pop(self.warp(), []))
        elif parts[-1].startswith("wait_group"):
            groups = self.groups.setdefault(self.warp(), [])
            while len(groups) > int(operands[0]):
                for to, values in groups.pop(0):
                    self.shared[to] = values
        else:
            to, lengths = self.address(operands[0]).astype(np.int64)[:, None] + np.arange(16), self.get(operands[3], np.uint32)
            values = np.zeros((len(to), 16), np.uint8)
            there = lengths > 0
            assert set(np.unique(lengths)) <= {0, 16}
            if there.any():
                memory, index = self.memory.at(self.address(operands[1])[there], 16)
                values[there] = memory[index]
            if self.lazy:
                self.copies.setdefault(self.warp(), []).append((to, values))
            else:
                self.shared[to] = values

    def load_matrix(self, transposed, registers, addresses):
        assert self.mask.size == WARP and len(registers) == 4
        rows = self.shared[addresses.astype(np.int64)[:, None] + np.arange(16)].view(np.uint16).reshape(-1, 4, 8, 8)  # warp, matrix, row, column
        lane = np.arange(WARP)
        for matrix, register in enumerate(registers):
            if transposed:
                pair = [rows[:, matrix, lane % 4 * 2 + half, lane // 4] for half in (0, 1)]
            else:
                pair = [rows[:, matrix, lane // 4, lane % 4 * 2 + half] for half in (0, 1)]
            low, high = (half.reshape(-1).astype(np.uint32) for half in pair)
            self.put(register, low | high << np.uint32(16))

    def multiply(self, out, left, right, sums):
        assert self.mask.size == WARP
        lane = np.arange(WARP)
        group, pair = lane // 4, lane % 4 * 2

        def halves(name):
            words = self.get(name, np.uint32).reshape(-1, WARP)
            return f32(words & np.uint32(0xFFFF)), f32(words >> np.uint32(16))

        a, b, c = (np.zeros((1, *shape), np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
        for index, name in enumerate(left):
            for half, values in enumerate(halves(name)):
                a[:, group + index % 2 * 8, pair + half + index // 2 * 8] = values
        for index, name in enumerate(right):
            for half, values in enumerate(halves(name)):
                b[:, pair + half + index * 8, group] = values
        places = [(group + index // 2 * 8, pair + index % 2) for index in range(4)]
        for place, name in zip(places, sums):
            c[:, place[0], place[1]] = self.get(name, np.float32).reshape(-1, WARP)
        d = a @ b + c
        for place, name in zip(places, out):
            self.put(name, d[:, place[0], place[1]].reshape(-1))

    def shuffle(self, how, operands):
        assert self.mask.size == WARP, "a shuffle of some threads"
        to, _, predicate = operands[0].partition("|")
        values, step = self.get(operands[1], np.uint32).reshape(-1, WARP), self.get(operands[2], np.uint32)[0]
        lane = np.arange(WARP)
        source = lane ^ step if how == "bfly" else np.where(lane >= step, lane - step, lane)
        self.put(to, values[:, source].reshape(-1))
        if predicate:
            self.put(predicate, np.tile(source != lane if how == "up" else np.ones(WARP, bool), len(values)))


# Cases.


def close(found, expected, name):
    found, expected = f32(found), expected.astype(np.float32)
    worst = np.abs(found - expected).max() / np.abs(expected).max()
    assert worst < 2**-7, f"{name} is off by {worst}"
    return worst


def erf(x):
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def check(path, random):
    text = open(path).read()
    kernel = Kernel(text)
    columns_of_tile = kernel.threads  # a warp for each 64 x 64 of a tile of 128 rows
    rows_of_expert = [130, 0, 7, 261]
    experts, rows, inner, columns = len(rows_of_expert), sum(rows_of_expert), 200, 328
    offsets = np.cumsum([0, *rows_of_expert]).astype(np.int32)
    ranges = list(zip(offsets[:-1], offsets[1:]))
    memory, worst = Memory(), 0
    x = bf16(random.standard_normal((rows, inner)))
    if kernel.name.startswith("weight_gradient"):
        gradient = bf16(random.standard_normal((rows, columns)))
        expected = np.stack([f32(x[a:b]).T @ f32(gradient[a:b]) for a, b in ranges])
        out = np.full(expected.shape, 0x7FC0, np.uint16)
        parameters = dict(zip("0123", map(memory.add, (x, gradient, offsets, out)))) | {"6+40": inner // 8, "6+44": columns // 8}
        grid = (-(-columns // columns_of_tile), -(-inner // 128), experts)
        wanted = [(out, expected)]
    else:
        biased, activated, keeps = ("param_2]" in text), "ex2" in text, "param_5]" in text
        transposed = ".trans" not in text
        weight = bf16(random.standard_normal((experts, columns, inner) if transposed else (experts, inner, columns)))
        bias = bf16(random.standard_normal((experts, columns)) * 8)
        pre = np.concatenate([f32(x[a:b]) @ (f32(w).T if transposed else f32(w)) + (f32(c) if biased else 0) for (a, b), w, c in zip(ranges, weight, bias)])
        out, kept = (np.full(pre.shape, 0x7FC0, np.uint16) for _ in range(2))
        arrays = (x, weight, bias, offsets, out, kept)
        parameters = dict(zip("012345", map(memory.add, arrays))) | {"7+48": inner // 8, "7+52": columns // 8, "7+56": experts}
        grid = (-(-columns // columns_of_tile), rows // 128 + experts, 1)
        wanted = [(out, pre * 0.5 * (1 + erf(pre / np.sqrt(2))) if activated else pre)] + ([(kept, pre)] if keeps else [])
    for lazy in (True, False):
        for found, _ in wanted:
            found[:] = 0x7FC0
        kernel.run(grid, parameters, memory, lazy)
        worst = max([worst, *(close(found, expected, kernel.name) for found, expected in wanted)])
    print(f"{kernel.name}: {kernel.threads} threads, {len(kernel.code)} instructions, right to {worst:.1e} of the largest value", flush=True)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        check(path, np.random.default_rng(0))
