"""captum's TracInCPFast: the same as TracInCP for the weights of the last layer only. Sign: see captum_tracincp.py."""

from exchange import Given, measure
from torch import Tensor
from torch.utils.data import TensorDataset

# begin
from captum.influence import TracInCPFast  # isort: skip
from torch import nn  # isort: skip

# end


def attribution(given: Given, queries: TensorDataset, _: None) -> Tensor:
    model, train, rate = given.model(), given.train, given.rate
    checkpoints = [given.state(step) for step in given.steps]

    # begin
    def load(model, state):
        model.load_state_dict(state)
        return rate

    tracin = TracInCPFast(
        model,
        model[-1],
        train,
        checkpoints,
        checkpoints_load_func=load,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=len(train),
    )
    return tracin.influence(queries.tensors)
    # end


if __name__ == "__main__":
    measure("captum", attribution)
