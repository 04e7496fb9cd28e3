"""kronfluence's pairwise influence; the option is its strategy: "ekfac", "kfac", "diagonal" or "identity".

Damping: ``damping_factor=None``, its heuristic of 0.1 × the mean eigenvalue, as in Grosse et al. (2023); its default is 1e-8.

Sign. Scores are ⟨∇measurement, H⁻¹ ∇ℓ(example)⟩ (kronfluence, "Technical Documentation"). More weight on an example moves the
parameters by −H⁻¹ ∇ℓ / N, so the score of measurement f is −N × df/dw. Its own examples measure −margin, and so does this: the
score is then N × d margin/dw, our sign.
"""

from exchange import Given, empty_folder, measure
from torch import Tensor
from torch.utils.data import TensorDataset

# begin
import torch  # isort: skip
import torch.nn.functional as F  # isort: skip
from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model  # isort: skip


class Margin(Task):
    def compute_train_loss(self, batch, model, sample=False):
        inputs, labels = batch
        logits = model(inputs)
        if sample:
            with torch.no_grad():
                labels = torch.multinomial(logits.softmax(-1), 1)[:, 0]
        return F.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch, model):
        inputs, labels = batch
        logits = model(inputs)
        true = logits.gather(1, labels[:, None])[:, 0]
        others = logits.scatter(1, labels[:, None], float("-inf"))
        return (others.logsumexp(1) - true).sum()


# end


def attribution(given: Given, queries: TensorDataset, _: None) -> Tensor:
    model, train, (strategy,) = given.model(), given.train, given.options
    with empty_folder() as folder:
        # begin
        task = Margin()
        model = prepare_model(model, task)
        analyzer = Analyzer("run", model, task, cpu=True, output_dir=folder, disable_tqdm=True)
        factors = FactorArguments(strategy=strategy)
        analyzer.fit_all_factors("factors", train, per_device_batch_size=256, factor_args=factors)
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            queries,
            train,
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=256,
            score_args=ScoreArguments(damping_factor=None),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"]
        # end


if __name__ == "__main__":
    measure("kronfluence", attribution)
