"""The number format in which ONNX computes each step of an estimator: a value must fall on scikit-learn's side of a threshold.

scikit-learn computes in float64. A graph in float32 rounds what a scaler, an imputer or a principal component gives, and a tree
whose threshold lies between the two numbers answers with another leaf. Boosted trees behind a StandardScaler predicted
something else for 53 of 1,000 training rows, gradient boosting for 30 of 20,000 rows that no probe had seen. So

- steps that compute are float64, as soon as an estimator has one (:func:`computes`);
- boosted trees over histograms then compare float64 numbers with float64 thresholds;
- all others stay float32: forests because scikit-learn itself rounds to float32 before it compares, networks because only
  float32 layers can be quantized, the rest because skl2onnx or ONNX Runtime have it in float32 alone.

skl2onnx calls a *converter* for each step, which adds nodes to a container, and a *shape calculator* for the type of what they
give. Here are those that differ from skl2onnx's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Converter = Callable[[Any, Any, Any], None]  # of skl2onnx's scope, operator and container

# What skl2onnx converts in float64 to scikit-learn's numbers, to the last bit; by skl2onnx's name of the converter.
_EXACT = {
    *("SklearnMaxAbsScaler", "SklearnMinMaxScaler", "SklearnQuantileTransformer"),
    *("SklearnReplaceTransformer", "SklearnRobustScaler", "SklearnScaler"),
}  # fmt: skip
# Likewise, but for the last bits: another order of a sum, another logarithm.
_ROUNDED = {
    *("SklearnGaussianRandomProjection", "SklearnIncrementalPCA", "SklearnKernelPCA", "SklearnNormalizer", "SklearnPCA"),
    *("SklearnNeighborhoodComponentsAnalysis", "SklearnPowerTransformer", "SklearnTruncatedSVD"),
    *("SklearnBayesianRidge", "SklearnLinearClassifier", "SklearnLinearRegressor", "SklearnLinearSVR"),
    *("SklearnPoissonRegressor", "SklearnTweedieRegressor"),
}  # fmt: skip
# How far a threshold of boosted trees is moved up behind such steps, as a share of it. Most of their thresholds are values of
# training rows; these rows went the other way, 53 of 1,000 behind a PCA. Two float32 differ by 1e-7 of them at least.
_LAST_BITS = 2.0**-45
# Trees that take missing values. Boosted ones over histograms are converted below; skl2onnx knows where their gaps go.
_TREES = {
    f"Sklearn{kind}{task}"
    for kind in ("DecisionTree", "ExtraTree", "RandomForest", "ExtraTrees")
    for task in ("Classifier", "Regressor")
}
# What passes others' numbers on in the format in which they come.
_TRANSPARENT = {
    *("BaggingClassifier", "BaggingRegressor", "CalibratedClassifierCV", "CastTransformer", "ColumnTransformer"),
    *("FeatureUnion", "FunctionTransformer", "GenericUnivariateSelect", "GridSearchCV", "MultiOutputClassifier", "MultiOutputRegressor"),
    *("OneVsRestClassifier", "Pipeline", "RFE", "RFECV", "SelectFdr", "SelectFpr", "SelectFromModel", "SelectFwe"),
    *("SelectKBest", "SelectPercentile", "StackingClassifier", "StackingRegressor", "TunedThresholdClassifierCV"),
    *("VarianceThreshold", "VotingClassifier", "VotingRegressor"),
}  # fmt: skip


def computes(estimator: Any) -> bool:
    """Whether a step of an estimator computes numbers that float32 would round."""
    from skl2onnx._supported_operators import sklearn_operator_name_map

    own = _own()
    return any(
        type(step) in own or sklearn_operator_name_map.get(type(step)) in _EXACT | _ROUNDED
        for step in _steps(estimator)
    )


def converters(estimator: Any) -> dict[type, Converter]:
    """By class: how a step of this estimator is converted, where that is not skl2onnx's way."""
    from skl2onnx._supported_operators import sklearn_operator_name_map
    from skl2onnx.common._registration import get_converter
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    found: dict[type, Converter] = {}
    own = _own()
    rounded = any(sklearn_operator_name_map.get(type(step)) in _ROUNDED for step in _steps(estimator))
    for kind, name in sklearn_operator_name_map.items():
        if (name in _EXACT | _ROUNDED and kind not in own) or kind.__name__ in _TRANSPARENT:
            continue
        if kind in (HistGradientBoostingClassifier, HistGradientBoostingRegressor):
            found[kind] = _boosted_trees(get_converter(name), _LAST_BITS if rounded else 0.0)
        else:
            found[kind] = _where_it_fits(own[kind]) if kind in own else _in_float32
    return found


def shape_calculators() -> dict[type, Callable[[Any], None]]:
    """By class: the type of what the converters of this file give."""
    return dict.fromkeys(_own(), _shape)


def _steps(estimator: Any) -> Iterator[Any]:
    """An estimator and all that it holds, in whatever attribute."""
    left, seen = [estimator], set()
    while left:
        value = left.pop()
        if isinstance(value, list | tuple):
            left.extend(value)
        elif isinstance(value, dict):
            left.extend(value.values())
        elif hasattr(value, "get_params") and not isinstance(value, type) and id(value) not in seen:
            seen.add(id(value))
            yield value
            left.extend(vars(value).values())


def _in_float32(scope: Any, operator: Any, container: Any) -> None:
    """skl2onnx's converter between two casts.

    It is that of the operator's type, not of its class: a TfidfVectorizer is first converted as one, then as the CountVectorizer
    and the TfidfTransformer that it is made of.
    """
    from skl2onnx.common._registration import get_converter
    from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType, guess_proto_type

    def cast(read: Any, made: Any) -> None:
        name, to = scope.get_unique_operator_name("Cast"), guess_proto_type(made.type)
        container.add_node("Cast", read.full_name, made.full_name, name=name, to=to)

    if not any(isinstance(variable.type, DoubleTensorType) for variable in operator.inputs):
        before = len(container.nodes)
        get_converter(operator.type)(scope, operator, container)
        if operator.type in _TREES:
            _send_missing(operator.raw_operator, container.nodes[before:])
        return
    inner = scope.declare_local_operator(operator.type, operator.raw_operator)
    for variable in operator.inputs:
        read = variable
        if isinstance(variable.type, DoubleTensorType):
            read = scope.declare_local_variable("float32", FloatTensorType(variable.type.shape))
            cast(variable, read)
        inner.inputs.append(read)
    for variable in operator.outputs:
        double = isinstance(variable.type, DoubleTensorType)
        made = scope.declare_local_variable("made", FloatTensorType() if double else type(variable.type)())
        inner.outputs.append(made)
        cast(made, variable)


def _send_missing(model: Any, nodes: Iterable[Any]) -> None:
    """Have trees in ONNX send a missing value where scikit-learn's trees send it.

    A tree that saw none at a split sends it where more of the training rows went, so this holds without gaps in training, too.
    """
    trees = [model] if hasattr(model, "tree_") else getattr(model, "estimators_", [])
    left = [tree.tree_.missing_go_to_left for tree in trees]
    for node in nodes:
        if node.op_type not in ("TreeEnsembleClassifier", "TreeEnsembleRegressor"):
            continue
        given = {attribute.name: attribute for attribute in node.attribute}
        places = zip(given["nodes_treeids"].ints, given["nodes_nodeids"].ints, strict=True)
        to_left = [int(left[tree][place]) for tree, place in places]
        del given["nodes_missing_value_tracks_true"].ints[:]
        given["nodes_missing_value_tracks_true"].ints.extend(to_left)


def _boosted_trees(theirs: Converter, last_bits: float) -> Converter:
    """skl2onnx's converter of trees over histograms, with thresholds of the format that they are compared in.

    :param last_bits: how far float64 thresholds are moved up, as a share of them.
    """
    import numpy as np
    from onnx import TensorProto, helper
    from skl2onnx.common.data_types import DoubleTensorType, guess_proto_type

    def convert(scope: Any, operator: Any, container: Any) -> None:
        nodes = [tree.nodes for trees in operator.raw_operator._predictors for tree in trees]  # noqa: SLF001
        if not isinstance(operator.inputs[0].type, DoubleTensorType):
            for each in nodes:
                each["num_threshold"] = _float32_not_above(each["num_threshold"])
            theirs(scope, operator, container)
            return
        # The list of outputs is set by its name, because Operator would note who reads and writes it.
        inner = copy.copy(operator)
        made = [scope.declare_local_variable("made", type(variable.type)()) for variable in operator.outputs]
        inner.__dict__["outputs"] = made
        theirs(scope, inner, container)
        thresholds = np.concatenate([np.where(n["is_leaf"], 0, n["num_threshold"]) for n in nodes])
        exact = {
            # Multiplied, because a threshold is infinite where a split is between missing values and all others.
            "nodes_values": thresholds * (1 + last_bits * np.sign(thresholds)),
            "nodes_hitrates": np.ones(sum(len(n) for n in nodes)),
            "base_values": np.ravel(operator.raw_operator._baseline_prediction),  # noqa: SLF001
        }
        leaves = np.concatenate([n["value"][n["is_leaf"] == 1] for n in nodes])
        ensemble = container.nodes[-1]
        for attribute in list(ensemble.attribute):
            name = attribute.name
            values = leaves if name in ("class_weights", "target_weights") else exact.get(name)
            if values is not None:
                ensemble.attribute.remove(attribute)
                tensor = helper.make_tensor(name, TensorProto.DOUBLE, [len(values)], values)
                ensemble.attribute.append(helper.make_attribute(f"{name}_as_tensor", tensor))
        container.node_domain_version_pair_sets.add(
            (ensemble.domain, 3)
        )  # the first that has these attributes
        for read, variable in zip(made, operator.outputs, strict=True):
            name, to = scope.get_unique_operator_name("Cast"), guess_proto_type(variable.type)
            container.add_node("Cast", read.full_name, variable.full_name, name=name, to=to)

    return convert


def _float32_not_above(thresholds: Any) -> Any:
    """The largest float32 not above each threshold.

    skl2onnx takes the nearest float32. Where that is above the threshold, a value between the two would change its side. For a
    float32 ``x``, ``x <= t`` means exactly ``x <= (the largest float32 not above t)``.
    """
    import numpy as np

    near = thresholds.astype(np.float32)
    return np.where(near > thresholds, np.nextafter(near, np.float32(-np.inf)), near)


def _own() -> dict[type, Converter]:
    """By class: the converters of this file, of what skl2onnx has in float32 alone, or not whole."""
    from sklearn.impute import SimpleImputer
    from sklearn.preprocessing import (
        Binarizer,
        KBinsDiscretizer,
        PolynomialFeatures,
        PowerTransformer,
        TargetEncoder,
    )

    return {
        Binarizer: _sides,
        KBinsDiscretizer: _bins,
        PolynomialFeatures: _products,
        PowerTransformer: _powers,
        SimpleImputer: _fill,
        TargetEncoder: _encodings,
    }


def _fits(operator: Any) -> bool:
    """Whether a step reads what its converter in this file was written for: numbers, and a TargetEncoder text."""
    from skl2onnx.common.data_types import DoubleTensorType, StringTensorType
    from sklearn.preprocessing import TargetEncoder

    wanted = StringTensorType if isinstance(operator.raw_operator, TargetEncoder) else DoubleTensorType
    return all(isinstance(variable.type, wanted) for variable in operator.inputs)


def _where_it_fits(own: Converter) -> Converter:
    def convert(scope: Any, operator: Any, container: Any) -> None:
        (own if _fits(operator) else _in_float32)(scope, operator, container)

    return convert


def _shape(operator: Any) -> None:
    from skl2onnx.common._registration import get_shape_calculator
    from skl2onnx.common.data_types import DoubleTensorType

    # What does not fit and is float64 goes through skl2onnx's converter between two casts.
    double = any(isinstance(variable.type, DoubleTensorType) for variable in operator.inputs)
    if not _fits(operator) and not double:
        get_shape_calculator(operator.type)(operator)
        return
    rows = operator.inputs[0].get_first_dimension()
    columns = len(operator.raw_operator.get_feature_names_out())
    operator.outputs[0].type = DoubleTensorType([rows, columns])


def _table(operator: Any) -> Any:
    """All that a step reads, as one matrix."""
    from skl2onnx.algebra.onnx_ops import OnnxConcat

    if len(operator.inputs) == 1:
        return operator.inputs[0]
    return OnnxConcat(*operator.inputs, axis=1, op_version=operator.target_opset)


def _sides(scope: Any, operator: Any, container: Any) -> None:
    """Binarizer: 1 above the threshold, 0 at it; in float64 skl2onnx's own gives 1 there."""
    import numpy as np
    from onnx import TensorProto
    from skl2onnx.algebra.onnx_ops import OnnxCast, OnnxGreater

    step, opset = operator.raw_operator, operator.target_opset
    above = OnnxGreater(_table(operator), np.array([float(step.threshold)]), op_version=opset)
    out = operator.outputs[:1]
    OnnxCast(above, to=TensorProto.DOUBLE, op_version=opset, output_names=out).add_to(scope, container)


def _fill(scope: Any, operator: Any, container: Any) -> None:
    """SimpleImputer: the statistic where a value is missing; columns without one are left out; the indicators behind."""
    import numpy as np
    from onnx import TensorProto
    from skl2onnx.algebra.onnx_ops import OnnxCast, OnnxConcat, OnnxEqual, OnnxGather, OnnxIsNaN, OnnxWhere

    step, opset, table = operator.raw_operator, operator.target_opset, _table(operator)
    mark = step.missing_values
    if mark is None or mark != mark:
        missing = OnnxIsNaN(table, op_version=opset)
    else:
        missing = OnnxEqual(table, np.array([mark], dtype=np.float64), op_version=opset)
    statistics = step.statistics_.astype(np.float64)
    filled = OnnxWhere(missing, statistics.reshape(1, -1), table, op_version=opset)
    if not step.keep_empty_features and np.isnan(statistics).any():
        filled = OnnxGather(filled, np.flatnonzero(~np.isnan(statistics)), axis=1, op_version=opset)
    parts = [filled]
    if step.add_indicator:
        marked = OnnxGather(missing, step.indicator_.features_.astype(np.int64), axis=1, op_version=opset)
        parts.append(OnnxCast(marked, to=TensorProto.DOUBLE, op_version=opset))
    OnnxConcat(*parts, axis=1, op_version=opset, output_names=operator.outputs[:1]).add_to(scope, container)


def _bins(scope: Any, operator: Any, container: Any) -> None:
    """KBinsDiscretizer: how many inner edges are not above the value, as a number or as a column for each bin."""
    import numpy as np
    from onnx import TensorProto
    from skl2onnx.algebra.onnx_ops import (
        OnnxCast,
        OnnxEqual,
        OnnxGather,
        OnnxGreaterOrEqual,
        OnnxReduceSum,
        OnnxReshape,
        OnnxUnsqueeze,
    )

    step, opset, table = operator.raw_operator, operator.target_opset, _table(operator)
    last, out = np.array([2]), operator.outputs[:1]
    most = int(max(step.n_bins_))
    edges = np.full((1, len(step.bin_edges_), most), np.inf)
    for column, found in enumerate(step.bin_edges_):
        edges[0, column, : len(found) - 2] = found[1:-1]
    above = OnnxGreaterOrEqual(OnnxUnsqueeze(table, last, op_version=opset), edges, op_version=opset)
    counted = OnnxCast(above, to=TensorProto.DOUBLE, op_version=opset)
    if step.encode == "ordinal":
        bins = OnnxReduceSum(counted, last, keepdims=0, op_version=opset, output_names=out)
        bins.add_to(scope, container)
        return
    bins = OnnxReduceSum(counted, last, keepdims=1, op_version=opset)
    here = OnnxEqual(bins, np.arange(most, dtype=np.float64).reshape(1, 1, -1), op_version=opset)
    wide = OnnxReshape(here, np.array([-1, edges.shape[1] * most]), op_version=opset)
    present = np.flatnonzero(np.arange(most) < np.asarray(step.n_bins_).reshape(-1, 1))
    kept = OnnxGather(wide, present, axis=1, op_version=opset)
    OnnxCast(kept, to=TensorProto.DOUBLE, op_version=opset, output_names=out).add_to(scope, container)


def _products(scope: Any, operator: Any, container: Any) -> None:
    """PolynomialFeatures: products of columns, multiplied in scikit-learn's order, from the last one on."""
    import numpy as np
    from skl2onnx.algebra.onnx_ops import OnnxGather, OnnxIdentity, OnnxMul, OnnxPad

    step, opset = operator.raw_operator, operator.target_opset
    columns, degree = step.powers_.shape[1], max(1, int(step.powers_.sum(axis=1).max()))
    # A column of ones behind the others stands for the factors that a product lacks.
    factors = np.full((len(step.powers_), degree), columns)
    for row, powers in zip(factors, step.powers_, strict=True):
        row[: powers.sum()] = np.repeat(np.arange(columns), powers)
    table = OnnxPad(_table(operator), np.array([0, 0, 0, 1]), np.array([1.0]), op_version=opset)
    product = OnnxGather(table, factors[:, -1], axis=1, op_version=opset)
    for position in range(degree - 2, -1, -1):
        product = OnnxMul(
            OnnxGather(table, factors[:, position], axis=1, op_version=opset), product, op_version=opset
        )
    OnnxIdentity(product, op_version=opset, output_names=operator.outputs[:1]).add_to(scope, container)


def _powers(scope: Any, operator: Any, container: Any) -> None:
    """PowerTransformer: Box & Cox 1964 or Yeo & Johnson 2000, then mean 0 and variance 1."""
    import numpy as np
    from skl2onnx.algebra.onnx_ops import (
        OnnxAbs,
        OnnxAdd,
        OnnxDiv,
        OnnxExp,
        OnnxIdentity,
        OnnxLess,
        OnnxLog,
        OnnxMul,
        OnnxNeg,
        OnnxSub,
        OnnxWhere,
    )

    step, opset, table = operator.raw_operator, operator.target_opset, _table(operator)
    one = np.array([1.0])

    def power(logarithm: Any, exponents: NDArray[np.float64]) -> Any:
        """``(b ** e - 1) / e`` of a base's logarithm, which is the logarithm itself where the exponent is 0."""
        zero = np.abs(exponents) < np.spacing(1.0)
        raised = OnnxExp(OnnxMul(logarithm, exponents, op_version=opset), op_version=opset)
        scaled = OnnxDiv(
            OnnxSub(raised, one, op_version=opset), np.where(zero, 1, exponents), op_version=opset
        )
        return OnnxWhere(zero, logarithm, scaled, op_version=opset)

    exponents = step.lambdas_.reshape(1, -1).astype(np.float64)
    if step.method == "box-cox":
        result = power(OnnxLog(table, op_version=opset), exponents)
    else:
        logarithm = OnnxLog(
            OnnxAdd(OnnxAbs(table, op_version=opset), one, op_version=opset), op_version=opset
        )
        result = OnnxWhere(
            OnnxLess(table, np.array([0.0]), op_version=opset),
            OnnxNeg(power(logarithm, 2 - exponents), op_version=opset),
            power(logarithm, exponents),
            op_version=opset,
        )
    if step.standardize:
        scaler = step._scaler  # noqa: SLF001
        centred = OnnxSub(result, scaler.mean_.reshape(1, -1), op_version=opset)
        result = OnnxDiv(centred, scaler.scale_.reshape(1, -1), op_version=opset)
    OnnxIdentity(result, op_version=opset, output_names=operator.outputs[:1]).add_to(scope, container)


def _encodings(scope: Any, operator: Any, container: Any) -> None:
    """TargetEncoder over text: the encoding of a category, the mean target for one that was not there."""
    import numpy as np
    from skl2onnx.algebra.onnx_ops import (
        OnnxArrayFeatureExtractor,
        OnnxConcat,
        OnnxGather,
        OnnxLabelEncoder,
        OnnxReshape,
    )

    step, opset, table = operator.raw_operator, operator.target_opset, _table(operator)
    targets = len(step.encodings_) // len(step.categories_)
    means, parts = np.ravel(step.target_mean_), []
    for column, categories in enumerate(step.categories_):
        mine = step.encodings_[column * targets : (column + 1) * targets]
        by_row = np.array([[*values, mean] for values, mean in zip(mine, means, strict=True)]).T
        text = OnnxArrayFeatureExtractor(table, np.array([column]), op_version=1)
        place = OnnxLabelEncoder(
            text,
            keys_strings=[str(c) for c in categories],
            values_int64s=list(range(len(categories))),
            default_int64=len(categories),
            op_version=2,
        )
        flat = OnnxReshape(place, np.array([-1]), op_version=opset)
        parts.append(OnnxGather(by_row, flat, axis=0, op_version=opset))
    OnnxConcat(*parts, axis=1, op_version=opset, output_names=operator.outputs[:1]).add_to(scope, container)
