"""Two rooms: walls hold, the door lets through, the guide arrives."""

import numpy as np

from subspan.reproduce.materials import two_room
from subspan.reproduce.materials.two_room import DOOR, EDGE, SPEED, WALL


def test_walls_hold_and_the_door_lets_through():
    right = np.array([[1.0, 0.0]])
    at = np.array([[0.5 - WALL - SPEED / 2, 0.9]])
    assert two_room.moved(at, right)[0].tolist() == [0.5 - WALL, 0.9]
    place = np.array([[0.4, 0.5]])
    for _ in range(6):
        place = two_room.moved(place, right)
    assert place[0, 0] > 0.5 + WALL
    # Inside the door one cannot leave by its sides, nor anywhere the square.
    inside = np.array([[0.5, 0.5 + DOOR - 0.01]])
    assert two_room.moved(inside, np.array([[0.0, 1.0]]))[0, 1] == 0.5 + DOOR
    assert two_room.moved(np.array([[0.1, EDGE]]), np.array([[0.0, -1.0]]))[0, 1] == EDGE
    # Faster than allowed is as fast as allowed.
    assert np.isclose(two_room.moved(place, 5 * right)[0, 0] - place[0, 0], SPEED)


def test_no_walk_goes_through_a_wall_and_walks_are_those_of_their_seed():
    walks = two_room.episodes(60, 12, 0)
    steps = walks.places[:, :-1].reshape(-1, 2)
    actions = walks.actions[:, :-1].reshape(-1, two_room.BLOCK, 2)
    for action in actions.swapaxes(0, 1):
        there = two_room.moved(steps, action)
        across = (steps[:, 0] - 0.5) * (there[:, 0] - 0.5) < 0
        assert (np.abs(steps[across, 1] - 0.5) < DOOR + 1e-9).all()
        steps = there
    np.testing.assert_allclose(steps, walks.places[:, 1:].reshape(-1, 2))
    assert np.isnan(walks.actions[:, -1]).all()
    np.testing.assert_array_equal(two_room.episodes(60, 12, 0).places, walks.places)


def test_the_guide_arrives_and_the_spot_is_where_the_point_is():
    draws = np.random.default_rng(0)
    here, goals = two_room.free(40, draws), two_room.free(40, draws)
    least = np.full(40, np.inf)
    for _ in range(60):
        here = two_room.moved(here, two_room.towards(here, goals))
        least = np.minimum(least, np.linalg.norm(here - goals, axis=1))
    assert (least < two_room.REACHED).all()
    image = two_room.rendered(np.array([[0.25, 0.75]]), size=32)[0]
    row, column = divmod(int(image[0].argmax()), 32)
    assert abs((column + 0.5) / 32 - 0.25) <= 1 / 32
    assert abs((row + 0.5) / 32 - 0.75) <= 1 / 32
    assert image[2, 0, 16] == 1
    assert image[2, 16, 16] == 0
