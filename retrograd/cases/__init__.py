"""Small games with known answers, ready-made: to try methods on, and to test them against closed forms."""

from retrograd.cases.digits_gan import DigitsCase, DigitsGAN, digits_gan, frechet_distance
from retrograd.cases.dilemmas import (
    iterated_prisoners_dilemma,
    matching_pennies,
    mixture,
    projected_dilemma,
    small_dilemma,
)
from retrograd.cases.game_case import GameCase, Method
from retrograd.cases.zero_sum import bilinear, dirac_gan, mixed_game, quadratic_game

__all__ = [
    "DigitsCase",
    "DigitsGAN",
    "GameCase",
    "Method",
    "bilinear",
    "digits_gan",
    "dirac_gan",
    "frechet_distance",
    "iterated_prisoners_dilemma",
    "matching_pennies",
    "mixed_game",
    "mixture",
    "projected_dilemma",
    "quadratic_game",
    "small_dilemma",
]
