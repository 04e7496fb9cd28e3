"""An influence function written with curvlinops' EK-FAC operator and its inverse.

Damping: 0.1 × the mean eigenvalue, over all layers (the operator takes one number).

Sign. curvlinops has no scores: the formula is ours, d margin/dw = −⟨(G + λ)⁻¹ ∇margin, ∇ℓ(example)⟩ / N.
"""

from exchange import Given, measure
from torch import Tensor
from torch.utils.data import TensorDataset

# begin
import torch  # isort: skip
from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator  # isort: skip
from torch import nn  # isort: skip
from torch.func import functional_call, grad, vmap  # isort: skip
from torch.utils.data import DataLoader  # isort: skip


def margin(logits, label):
    others = logits.scatter(0, label[None], float("-inf"))
    return logits[label[None]][0] - others.logsumexp(0)


# end


def attribution(given: Given, queries: TensorDataset, _: None) -> Tensor:
    model, train = given.model(), given.train

    # begin
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = nn.CrossEntropyLoss()

    def per_example(function):
        def value(parameters, image, label):
            return function(functional_call(model, dict(zip(names, parameters, strict=True)), (image,)), label)

        return vmap(grad(value), in_dims=(None, 0, 0))

    detached = tuple(leaf.detach() for leaf in parameters)
    factors = EKFACLinearOperator(
        model,
        loss,
        list(parameters),
        DataLoader(train, batch_size=256),
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    damping = 0.1 * float(factors.trace) / factors.shape[0]
    inverse = KFACInverseLinearOperator(factors, damping=damping, use_exact_damping=True)
    asked = per_example(margin)(detached, *queries.tensors)
    vectors = inverse @ [leaf.movedim(0, -1) for leaf in asked]
    vectors = torch.cat([leaf.flatten(0, -2) for leaf in vectors])
    products = []
    for batch in DataLoader(train, batch_size=256):
        gradients = torch.cat([leaf.flatten(1) for leaf in per_example(loss)(detached, *batch)], dim=1)
        products.append(gradients @ vectors)
    return -torch.cat(products).T / len(train)
    # end


if __name__ == "__main__":
    measure("curvlinops-for-pytorch", attribution)
