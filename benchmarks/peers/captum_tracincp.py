"""captum's TracInCP over the checkpoints of the run; option "loss" or "margin" says what is differentiated of the query.

Sign. "Positive influence scores" are those of proponents, training examples whose steps lower the loss of the query
(sum over checkpoints of rate × ⟨∇ℓ(query), ∇ℓ(example)⟩; captum, `TracInCP`). What lowers the loss of the true label raises its
margin, so scores for the loss have our sign. For the margin itself the function of the query is −margin, for the same sign.
"""

from exchange import Given, measure
from torch import Tensor
from torch.utils.data import TensorDataset

# begin
from captum.influence import TracInCP  # isort: skip
from torch import nn  # isort: skip

# end
# begin margin


def minus_margin(logits, labels):
    true = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return (others.logsumexp(1) - true).sum()


# end


def attribution(given: Given, queries: TensorDataset, _: None) -> Tensor:
    model, train, rate = given.model(), given.train, given.rate
    checkpoints = [given.state(step) for step in given.steps]
    asked = {"margin": minus_margin, "loss": None}[given.options[0]]

    # begin
    def load(model, state):
        model.load_state_dict(state)
        return rate

    tracin = TracInCP(
        model,
        train,
        checkpoints,
        checkpoints_load_func=load,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        test_loss_fn=asked,
        batch_size=256,
        sample_wise_grads_per_batch=True,
    )
    return tracin.influence(queries.tensors)
    # end


if __name__ == "__main__":
    measure("captum", attribution)
