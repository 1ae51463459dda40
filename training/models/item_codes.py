"""Item ids broken into codes that items share: the "reverse process of tokenization" (Huang,
"Revisiting Self-Attentive Sequential Recommendation").

A table of items grows with the catalogue; codebooks do not. The codes of an item are fixed before
training, by quantising what its users say about it:

    who chose what  ->  item factors (truncated SVD)  ->  k-means, a code at a time

as RecJPQ does (Petrov and Macdonald, 2024), with the last code telling apart items that share all
others (TIGER: Rajput et al., 2023). Only the log is looked at, no side information of items.

Shapes: R catalogue rows, M codes of an item, K codes of a codebook, N items, F factors, P choices,
D embedding width.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from contract.catalogue import FIRST_ROW, PADDING_ROW, UNKNOWN_ROW
from training.errors import ConfigError
from training.models.encoder import ItemEncoder, embedding_table

Quantisation = Literal["product", "residual"]

N_FACTORS = 64
_SVD_ROUNDS = 4
_OVERSAMPLING = 10
_KMEANS_ROUNDS = 25
_BLOCK_POINTS = 1 << 16


class ItemCodes(ItemEncoder):
    """Stands where an `ItemEncoder` does; an item's vector is composed of its M code embeddings.

    "product": the parts, D / M wide each, are concatenated (product quantisation: Jegou et al.,
    2011); "residual": vectors of the full width are summed. `code_of_row`: int64 [R, M], as
    `fit_codes` returns it: what 0 and 1 mean among rows, they mean among codes, so the unknown item
    has a code of its own in every codebook. It is part of the state dict; parameters are
    M (K + 2) D for "residual", and (K + 2) D for "product", whatever R is.
    """

    code_of_row: Tensor

    def __init__(
        self,
        code_of_row: Tensor,
        embedding_dim: int,
        *,
        codebook_size: int,
        quantisation: Quantisation,
    ) -> None:
        # The table of items that ItemEncoder makes is what codes are there to avoid.
        nn.Module.__init__(self)
        n_codes = code_of_row.shape[1]
        if quantisation == "product" and embedding_dim % n_codes:
            raise ValueError(f"a width of {embedding_dim} has no {n_codes} equal parts")
        if len(code_of_row) and int(code_of_row.max()) >= FIRST_ROW + codebook_size:
            raise ValueError(
                f"code_of_row holds code {int(code_of_row.max())}, "
                f"codebooks end at {FIRST_ROW + codebook_size - 1}"
            )
        self.is_product = quantisation == "product"
        width = embedding_dim // n_codes if self.is_product else embedding_dim
        codebooks = [
            embedding_table(FIRST_ROW + codebook_size, width, padding_idx=PADDING_ROW)
            for _ in range(n_codes)
        ]
        with torch.no_grad():
            for codebook in codebooks:
                # M parts of length 1 would make vectors of length sqrt(M).
                codebook.weight.mul_(n_codes**-0.5)
        self.codebooks = nn.ModuleList(codebooks)
        self.register_buffer("code_of_row", code_of_row)

    def forward(self, rows: Tensor) -> Tensor:
        """Return embeddings [..., D] of catalogue rows [...]; exactly 0 for padding."""
        return self._composed(self.code_of_row[rows])

    def table(self) -> Tensor:
        """Return the embeddings [R, D] of the whole catalogue."""
        return self._composed(self.code_of_row)

    def _composed(self, codes: Tensor) -> Tensor:
        parts = [codebook(codes[..., m]) for m, codebook in enumerate(self.codebooks)]
        return torch.cat(parts, dim=-1) if self.is_product else torch.stack(parts).sum(dim=0)


def item_factors(
    users_P: Tensor, rows_P: Tensor, *, n_rows: int, n_factors: int = N_FACTORS, seed: int
) -> Tensor:
    """Return what users say about items: float32 [R, F], of length 1, or 0 where nobody chose it.

    Left singular vectors, times singular values, of the matrix log(1 + n) / sqrt(d_item d_user): n
    is how often a user (`users_P`, from 0) chose an item (`rows_P`), and d the sums of log(1 + n)
    over its row and column; without them the popularity of an item would decide. The SVD is
    randomised (Halko et al., 2011): the matrix stays sparse. A log too small for F factors fills up
    with zeros. `seed` decides all that is random.
    """
    factors_RF = torch.zeros(n_rows, n_factors)
    if not len(rows_P):
        return factors_RF
    n_users = int(users_P.max()) + 1
    counts = torch.sparse_coo_tensor(
        torch.stack([rows_P, users_P]),
        torch.ones(len(rows_P)),
        (n_rows, n_users),
        check_invariants=True,
    ).coalesce()
    (rows, users), weights = counts.indices(), counts.values().log1p()
    of_row = torch.zeros(n_rows).index_add_(0, rows, weights)
    of_user = torch.zeros(n_users).index_add_(0, users, weights)
    matrix_RU = torch.sparse_coo_tensor(
        counts.indices(),
        weights * (of_row[rows] * of_user[users]).rsqrt(),
        (n_rows, n_users),
        check_invariants=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left_RF, values_F, _ = torch.svd_lowrank(
            matrix_RU, q=min(n_factors + _OVERSAMPLING, n_rows, n_users), niter=_SVD_ROUNDS
        )
    rank = min(n_factors, len(values_F))
    factors_RF[:, :rank] = (left_RF * values_F)[:, :rank]
    factors_RF[of_row == 0] = 0  # rounding leaves traces where there is nothing
    return nn.functional.normalize(factors_RF, dim=1)


def fit_codes(
    factors_RF: Tensor, *, codes: int, codebook_size: int, quantisation: Quantisation, seed: int
) -> Tensor:
    """Return the codes int64 [R, codes] of every catalogue row: 0 for padding, 1 for the unknown
    item, from 2 on for items, no two of which have all codes in common.

    All but the last code are fitted to `factors_RF` by k-means: of its own share of the factors
    each ("product"; a random rotation spreads what they tell over the shares), or of what the codes
    before it left over ("residual"). The last one numbers the items that share all others. Where
    more share them than a codebook can number, those farthest from their centroid go to the nearest
    one with room. Raises ConfigError when there is none.
    """
    n_rows, n_factors = factors_RF.shape
    assert codes >= 2
    generator = torch.Generator().manual_seed(seed)
    rotation_FF, _ = torch.linalg.qr(torch.randn(n_factors, n_factors, generator=generator))
    shares = (factors_RF[FIRST_ROW:] @ rotation_FF).tensor_split(codes - 1, dim=1)
    rest_NF = factors_RF[FIRST_ROW:]
    fitted: list[Tensor] = []
    for m in range(codes - 1):
        points_NF = shares[m] if quantisation == "product" else rest_NF
        centroids_KF = k_means(points_NF, codebook_size, generator)
        code_N, _ = nearest(points_NF, centroids_KF)
        fitted.append(code_N)
        if quantisation == "residual":
            rest_NF = points_NF - centroids_KF[code_N]
    code_NM = _told_apart(torch.stack(fitted, dim=1), points_NF, centroids_KF, codebook_size)
    code_of_row = torch.full((n_rows, codes), PADDING_ROW, dtype=torch.int64)
    code_of_row[UNKNOWN_ROW] = UNKNOWN_ROW
    code_of_row[FIRST_ROW:] = FIRST_ROW + code_NM
    return code_of_row


def k_means(points_NF: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Return at most `n_clusters` centroids [K, F] (Lloyd, 1982), never more than points."""
    centroids_KF = _spread(points_NF, n_clusters, generator)
    for _ in range(_KMEANS_ROUNDS):
        nearest_N, distance_N = nearest(points_NF, centroids_KF)
        count_K = nearest_N.bincount(minlength=len(centroids_KF))
        moved_KF = torch.zeros_like(centroids_KF).index_add_(0, nearest_N, points_NF)
        moved_KF /= count_K.clamp(min=1).unsqueeze(1)
        # A centroid that lost all its points starts again where points are badly served.
        lost_K = (count_K == 0).nonzero()[:, 0]
        moved_KF[lost_K] = points_NF[distance_N.topk(len(lost_K)).indices]
        if torch.equal(moved_KF, centroids_KF):
            break
        centroids_KF = moved_KF
    return centroids_KF


def _spread(points_NF: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Return points to start from, each drawn by its squared distance to those before it, of a
    sample where there are many (k-means++: Arthur and Vassilvitskii, 2007).
    """
    sample_NF = points_NF[torch.randperm(len(points_NF), generator=generator)[:_BLOCK_POINTS]]
    chosen = list(range(min(1, len(sample_NF))))
    square_N = torch.full((len(sample_NF),), torch.inf)
    while len(chosen) < min(n_clusters, len(sample_NF)):
        square_N = square_N.minimum((sample_NF - sample_NF[chosen[-1]]).square().sum(dim=1))
        # Where all points are taken, one is as good as another.
        weights_N = square_N if square_N.any() else torch.ones_like(square_N)
        chosen.append(int(torch.multinomial(weights_N, 1, generator=generator)))
    return sample_NF[chosen]


def nearest(points_NF: Tensor, centroids_KF: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest centroid of each point, int64 [N], and its distance [N]."""
    index_N = torch.zeros(len(points_NF), dtype=torch.int64)
    distance_N = torch.zeros(len(points_NF))
    for first in range(0, len(points_NF), _BLOCK_POINTS):
        block = slice(first, first + _BLOCK_POINTS)
        distance_N[block], index_N[block] = torch.cdist(points_NF[block], centroids_KF).min(dim=1)
    return index_N, distance_N


def _told_apart(
    code_NM: Tensor, points_NF: Tensor, centroids_KF: Tensor, codebook_size: int
) -> Tensor:
    """Return the codes with one more; `points_NF`, `centroids_KF`: of the last of `code_NM`."""
    code_NM = code_NM.clone()
    distance_N = (points_NF - centroids_KF[code_NM[:, -1]]).norm(dim=1)
    members: dict[tuple[int, ...], int] = {}
    number_N = torch.zeros(len(code_NM), dtype=torch.int64)
    homeless: list[int] = []
    for n in distance_N.argsort(stable=True).tolist():
        shared = tuple(code_NM[n].tolist())
        number = members.get(shared, 0)
        if number == codebook_size:
            homeless.append(n)
            continue
        members[shared], number_N[n] = number + 1, number
    for n in homeless:
        *before, _ = code_NM[n].tolist()
        distance_K = (centroids_KF - points_NF[n]).norm(dim=1)
        for code in distance_K.argsort(stable=True).tolist():
            number = members.get((*before, code), 0)
            if number < codebook_size:
                break
        else:
            raise ConfigError(
                f"model.codebook_size: {len(code_NM)} items cannot be told apart by "
                f"{code_NM.shape[1] + 1} codes of {codebook_size}: take more codes, or larger "
                "codebooks"
            )
        members[(*before, code)], number_N[n], code_NM[n, -1] = number + 1, number, code
    return torch.cat([code_NM, number_N.unsqueeze(1)], dim=1)
