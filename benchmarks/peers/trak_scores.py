"""TRAK on the models at the end of several runs; the options are their number, the dimension of the projection and the ridge.

Dimension: it must be well below the number of examples, as TRAK inverts the second moment of the projected gradients. Its
default is no ridge, ``lambda_reg=0``. That does badly here (512 dimensions on task B: LDS 0.09, and 0.18 for 128), so it is
also run with the best ridge of 0, 1e-4, 1e-2, 1, 10, ... 1e5, chosen in its favour by the truth of task B: 1000 (LDS 0.54).
Half precision, another default, is for GPUs and is turned off.

Sign. The model output of "image_classification" is the margin log p − log(1 − p), and scores estimate how much including the
example raises it (TRAK, section 3; the sum of the scores of a subset is the prediction of the datamodel). That is our sign.
TRAK gives [example, query].
"""

from exchange import Given, empty_folder, measure
from torch import Tensor
from torch.utils.data import TensorDataset

# begin
import torch  # isort: skip
from torch.utils.data import DataLoader  # isort: skip
from trak import TRAKer  # isort: skip

# end


def attribution(given: Given, queries: TensorDataset, _: None) -> Tensor:
    model, train, (count, dimension, ridge) = given.model(), given.train, map(int, given.options)
    states = [given.state(given.final, seed) for seed in range(count)]
    with empty_folder() as folder:
        # begin
        traker = TRAKer(
            model,
            "image_classification",
            len(train),
            save_dir=folder,
            device="cpu",
            proj_dim=dimension,
            use_half_precision=False,
            lambda_reg=ridge,
        )
        for number, state in enumerate(states):
            traker.load_checkpoint(state, model_id=number)
            for batch in DataLoader(train, batch_size=256):
                traker.featurize(batch, num_samples=len(batch[0]))
        traker.finalize_features()
        for number, state in enumerate(states):
            traker.start_scoring_checkpoint("queries", state, number, num_targets=len(queries))
            for batch in DataLoader(queries, batch_size=256):
                traker.score(batch, num_samples=len(batch[0]))
        return torch.tensor(traker.finalize_scores("queries")).T
        # end


if __name__ == "__main__":
    measure("traker", attribution)
