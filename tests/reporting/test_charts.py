import numpy as np
import pytest

from loupe.reporting.charts import DOTTED_POINTS, NUM_BARS, Line, build_chart, build_score_chart


def chart(x, y, **options):
    values = np.array(x, np.float64), np.array(y, np.float64)
    return build_chart("a chart", ("x", "y"), [Line("line", "first", *values, **options.pop("line", {}))], **options)


def read_points(drawn):
    return [tuple(float(value) for value in point.split(",")) for point in drawn.lines[0].points.split()]


def test_points_stand_where_the_ticks_say():
    drawn = chart([0, 5, 10], [0.0, 0.5, 1.0])
    x_places, y_places = ({tick.text: tick.place for tick in ticks} for ticks in (drawn.x_ticks, drawn.y_ticks))
    points = read_points(drawn)
    assert points[0] == (x_places["0"], y_places["0"])
    assert points[2] == (x_places["10"], y_places["1"])
    assert points[1] == pytest.approx(((points[0][0] + points[2][0]) / 2, (points[0][1] + points[2][1]) / 2), abs=0.1)


def test_higher_values_stand_higher():
    first, second = read_points(chart([0, 1], [0, 1]))
    assert first[0] < second[0]
    assert first[1] > second[1]


@pytest.mark.parametrize("values", [[0.3, 0.31], [-5, 1e6], [0.7251, 0.7252], [3, 3], [1e-9, 2e-9]])
def test_all_is_drawn_inside_the_frame(values):
    drawn = chart(range(2), values)
    for x, y in read_points(drawn):
        assert drawn.left <= x <= drawn.right
        assert drawn.top <= y <= drawn.bottom
    assert 2 <= len(drawn.y_ticks) <= 9


def test_epochs_have_whole_ticks():
    assert [tick.text for tick in chart([0, 1, 2], [3, 2, 1], whole_x=True).x_ticks] == ["0", "1", "2"]


def test_one_point_is_a_dot_in_the_middle():
    drawn = chart([0], [2], whole_x=True)
    (dot,) = drawn.lines[0].dots
    assert dot.x == pytest.approx((drawn.left + drawn.right) / 2)
    assert dot.text == "line: x 0, y 2"


def test_what_is_not_finite_is_left_out():
    assert len(read_points(chart([0, 1, 2], [1, np.nan, 3]))) == 2
    assert chart([], []).lines[0].points == ""


def test_a_long_line_has_no_dots():
    many = range(DOTTED_POINTS + 1)
    assert chart(many, many).lines[0].dots == []
    assert len(chart(many[1:], many[1:]).lines[0].dots) == DOTTED_POINTS


def test_weights_are_areas():
    small, large = (dot.radius for dot in chart([0, 1], [0, 1], line={"weights": np.array([0.25, 1.0])}).lines[0].dots)
    assert large == pytest.approx(2 * small)


def test_a_mark_has_a_place_and_a_name():
    drawn = chart([0, 1, 2], [1, 2, 3], whole_x=True, mark=(1.0, "best epoch"))
    assert drawn.mark == drawn.x_ticks[1].place
    assert drawn.mark_name == "best epoch"


def score_chart(upper, lower, also=(0.5,)):
    values = (np.array(scores, np.float64) for scores in (upper, lower, also))
    return build_score_chart("scores", ("normal", "anomalous"), *values)


def test_two_kinds_of_scores_stand_back_to_back_in_the_same_unit():
    generator = np.random.default_rng(0)
    drawn = score_chart(generator.normal(0, 1, 200), generator.normal(2, 1, 50))
    assert all(bar.y + bar.height == pytest.approx(drawn.middle, abs=0.11) for bar in drawn.upper)
    assert all(bar.y == drawn.middle for bar in drawn.lower)
    upper, lower = (sum(bar.height for bar in bars) for bars in (drawn.upper, drawn.lower))
    assert upper == pytest.approx(lower, rel=0.03)
    assert min(bar.y for bar in drawn.upper) == pytest.approx(drawn.top, abs=0.11)
    assert max(bar.y + bar.height for bar in drawn.lower) == pytest.approx(drawn.bottom, abs=0.11)


def test_bars_count_the_scores_between_their_ends():
    scores = np.random.default_rng(0).normal(0, 1, 200)
    drawn = score_chart(scores, [])
    counts = np.histogram(scores, np.linspace(drawn.low, drawn.high, NUM_BARS + 1))[0]
    assert [int(bar.text.split()[0]) for bar in drawn.upper] == counts[counts > 0].tolist()
    assert drawn.lower == []


@pytest.mark.parametrize(
    ("upper", "lower", "also"), [([1], [1], [1]), ([], [], [3]), ([-5, 1e6], [], [0]), ([1], [2], [9])]
)
def test_all_scores_and_the_others_lie_inside_the_chart_of_scores(upper, lower, also):
    drawn = score_chart(upper, lower, also)
    assert drawn.low < min([*upper, *lower, *also])
    assert drawn.high > max([*upper, *lower, *also])
    assert all(drawn.left <= bar.x <= bar.x + bar.width <= drawn.right + 0.11 for bar in [*drawn.upper, *drawn.lower])
    assert all(drawn.left <= tick.place <= drawn.right for tick in drawn.x_ticks)
    assert len(drawn.x_ticks) >= 2
