"""Networks on sets, points and graphs: gathered and scattered, written in plain torch or with PyG."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.families.family import Build, Family

_NODES, _EDGES, _WIDTH, _CLASSES = 768, 3072, 128, 7


class MessagePassing(nn.Module):
    """Messages of edges, summed at their targets and divided by the degree."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.message, self.own = nn.Linear(2 * width, out), nn.Linear(width, out)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """[N, W] and [2, E] -> [N, out]."""
        source, target = edges
        messages = F.silu(self.message(torch.cat([x[source], x[target]], -1)))
        summed = x.new_zeros(len(x), messages.shape[1]).index_add(0, target, messages)
        degree = torch.zeros_like(x[:, 0]).index_add(0, target, torch.ones_like(target, dtype=x.dtype))
        return self.own(x) + summed / degree.clamp(min=1)[:, None]


class GraphAttention(nn.Module):
    """Softmax over the edges that meet in a node, written with scatter."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.inner, self.score = nn.Linear(width, out), nn.Linear(2 * out, 1)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """[N, W] and [2, E] -> [N, out]."""
        source, target = edges
        h = self.inner(x)
        score = F.leaky_relu(self.score(torch.cat([h[source], h[target]], -1)), 0.2).squeeze(-1)
        largest = score.new_full((len(x),), -1e9).scatter_reduce(0, target, score.detach(), "amax")
        weight = (score - largest[target]).exp()
        total = weight.new_zeros(len(x)).index_add(0, target, weight)
        weight = weight / (total[target] + 1e-9)
        return h.new_zeros(h.shape).index_add(0, target, weight[:, None] * h[source])


class Nodes(nn.Module):
    """Two layers on a graph, and a classifier of nodes."""

    def __init__(self, first: nn.Module, second: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.activation = first, second, activation

    def forward(self, x: Tensor, edges: Tensor, labels: Tensor) -> Tensor:
        """[N, W], [2, E] and [N] -> loss."""
        return F.cross_entropy(self.second(self.activation(self.first(x, edges)), edges), labels)


def _on_graph(make: Callable[[], nn.Module]) -> Build:
    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        batch = (torch.randn(_NODES, _WIDTH), torch.randint(_NODES, (2, _EDGES)), torch.randint(_CLASSES, (_NODES,)))
        return make().train(), batch

    return build


def _by_hand(layer: Callable[[int, int], nn.Module]) -> Build:
    return _on_graph(lambda: Nodes(layer(_WIDTH, 256), layer(256, _CLASSES), nn.ELU()))


def _geometric(name: str) -> Build:
    def make() -> nn.Module:
        import torch_geometric.nn as geometric

        def layer(width: int, out: int) -> nn.Module:
            if name == "GINConv":
                return geometric.GINConv(nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, out)))
            built: nn.Module = getattr(geometric, name)(width, out)
            return built

        return Nodes(layer(_WIDTH, 256), layer(256, _CLASSES), nn.ReLU())

    return _on_graph(make)


class DeepSets(nn.Module):
    """A function of the sum of functions of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.all = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, _CLASSES))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """[B, S, 8] and [B] -> loss."""
        return F.cross_entropy(self.all(self.each(x).mean(1)), labels)


class PointNet(nn.Module):
    """The largest of each feature over all points."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(
            *(nn.Conv1d(3, 64, 1), nn.BatchNorm1d(64), nn.ReLU(), nn.Conv1d(64, 256, 1), nn.BatchNorm1d(256), nn.ReLU())
        )
        self.head = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, _CLASSES))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """[B, 3, P] and [B] -> loss."""
        return F.cross_entropy(self.head(self.each(x).amax(-1)), labels)


class Recommender(nn.Module):
    """Embeddings of users and items, their products and a network on both (neural collaborative filtering)."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(200, 128), nn.Embedding(300, 128)
        self.inner = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
        self.head = nn.Linear(256, 1)

    def forward(self, user: Tensor, item: Tensor, rating: Tensor) -> Tensor:
        """[R] thrice -> loss."""
        u, i = self.users(user), self.items(item)
        score = self.head(torch.cat([u * i, self.inner(torch.cat([u, i], -1))], -1)).squeeze(-1)
        return F.mse_loss(score, rating)


FAMILIES = (
    Family(name="message passing by hand", build=_by_hand(MessagePassing)),
    Family(name="graph attention by hand", build=_by_hand(GraphAttention)),
    *(
        Family(name=f"pyg {name}", needs="torch_geometric", build=_geometric(name))
        for name in ("GCNConv", "GATConv", "SAGEConv", "GINConv", "GATv2Conv", "TransformerConv")
    ),
    Family(name="deep sets", build=lambda: (DeepSets(), (torch.randn(32, 64, 8), torch.randint(_CLASSES, (32,))))),
    Family(name="pointnet", build=lambda: (PointNet(), (torch.randn(16, 3, 128), torch.randint(_CLASSES, (16,))))),
    Family(
        name="recommender",
        build=lambda: (Recommender(), (torch.randint(200, (1024,)), torch.randint(300, (1024,)), torch.randn(1024))),
    ),
)
