"""What the sources of Triton kernels may contain, so that one source serves NVIDIA and AMD."""

from __future__ import annotations

import ast
from pathlib import Path

# Names that only NVIDIA has (inline assembly is of one architecture whatever it says).
_NVIDIA_NAMES = frozenset(
    [
        "inline_asm_elementwise",
        "TensorDescriptor",
        "make_tensor_descriptor",
        "load_tensor_descriptor",
        "store_tensor_descriptor",
        "experimental_descriptor_load",
        "gdc_wait",
        "gdc_launch_dependents",
        "globaltimer",
        "smid",
    ]
)
_NVIDIA_KEYWORDS = frozenset(["warp_specialize", "allow_tf32", "max_num_imprecise_acc"])
_NVIDIA_OPTIONS = frozenset(["launch_pdl", "maxnreg", "num_ctas", "ir_override"])


def violations(path: Path) -> list[str]:
    """One message per use of something that only NVIDIA has, outside a branch on a constexpr parameter."""
    visitor = _Visitor(path.name)
    visitor.visit(ast.parse(path.read_text()))
    return visitor.found


class _Visitor(ast.NodeVisitor):
    def __init__(self, file: str) -> None:
        self.file = file
        self.found: list[str] = []
        self._cuda_names: set[str] = set()  # imported from triton.language.extra.cuda, whatever they are called
        self._constexprs: set[str] = set()
        self._kernels: set[str] = set()
        self._guards = 0
        self._in_kernel = False

    def _report(self, node: ast.AST, what: str) -> None:
        line = getattr(node, "lineno", 0)
        self.found.append(f"{self.file}:{line}: {what}; put it behind `if <constexpr>:` that is false on AMD")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        # An import alone does nothing; the uses of its names count.
        for alias in node.names:
            if "cuda" in (node.module or "").split(".") or alias.name == "cuda":
                self._cuda_names.add(alias.asname or alias.name)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        is_kernel = any(
            "jit" in ast.unparse(decorator).replace("(", ".").split(".") for decorator in node.decorator_list
        )
        before = self._in_kernel, self._constexprs
        self._in_kernel = is_kernel
        arguments = [*node.args.args, *node.args.kwonlyargs]
        self._constexprs = {a.arg for a in arguments if a.annotation and "constexpr" in ast.unparse(a.annotation)}
        if is_kernel:
            self._kernels.add(node.name)
        self.generic_visit(node)
        self._in_kernel, self._constexprs = before

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if isinstance(node.target, ast.Name) and "constexpr" in ast.unparse(node.annotation):
            self._constexprs.add(node.target.id)
        self.generic_visit(node)

    def _branch(self, test: ast.expr, guarded: list[ast.AST], others: list[ast.AST]) -> None:
        names = {name.id for name in ast.walk(test) if isinstance(name, ast.Name)}
        is_guard = bool(names) and names <= self._constexprs
        self.visit(test)
        # `if not HIP: ... ` and `if HIP: ... else: ...` both choose at compile time.
        self._guards += is_guard
        for child in guarded + others:
            self.visit(child)
        self._guards -= is_guard

    def visit_If(self, node: ast.If) -> None:
        self._branch(node.test, list(node.body), list(node.orelse))

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._branch(node.test, [node.body], [node.orelse])

    def visit_Name(self, node: ast.Name) -> None:
        if self._in_kernel and not self._guards and node.id in self._cuda_names | _NVIDIA_NAMES:
            self._report(node, f"{node.id} exists on NVIDIA only")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        text = ast.unparse(node)
        if self._in_kernel and not self._guards:
            if ".extra.cuda" in text:
                self._report(node, f"{text} exists on NVIDIA only")
                return
            if node.attr in _NVIDIA_NAMES:
                self._report(node, f"{text} exists on NVIDIA only")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else keyword.value
            if keyword.arg in _NVIDIA_KEYWORDS and not self._guards:
                self._report(node, f"{keyword.arg}= means something on NVIDIA only")
            if keyword.arg == "input_precision" and isinstance(value, str) and value.startswith("tf32"):
                self._report(node, f"input_precision={value!r} does not compile on AMD")
            if not self._in_kernel and keyword.arg in _NVIDIA_OPTIONS and "LaunchConfig" not in ast.unparse(node.func):
                self._report(node, f"{keyword.arg}= belongs into LaunchConfig(cuda=...)")
        function = node.func
        launched = function.value if isinstance(function, ast.Subscript) else None
        if isinstance(launched, ast.Name) and launched.id in self._kernels:
            self.found.append(f"{self.file}:{node.lineno}: {launched.id} is not launched by Target.launch")
        self.generic_visit(node)
