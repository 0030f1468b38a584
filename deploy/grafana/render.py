"""From the plain description of a dashboard to Grafana's JSON, with Grafana's own library of types."""

from __future__ import annotations

from collections.abc import Callable
from string import ascii_uppercase

from grafana_foundation_sdk.builders import bargauge as bargauge_builder
from grafana_foundation_sdk.builders import common as common_builder
from grafana_foundation_sdk.builders import dashboard as dashboard_builder
from grafana_foundation_sdk.builders import heatmap as heatmap_builder
from grafana_foundation_sdk.builders import prometheus as prometheus_builder
from grafana_foundation_sdk.builders import stat as stat_builder
from grafana_foundation_sdk.builders import statetimeline as statetimeline_builder
from grafana_foundation_sdk.builders import table as table_builder
from grafana_foundation_sdk.builders import timeseries as timeseries_builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard, heatmap, prometheus

from deploy.grafana.spec import RANGE, Dashboard, Kind, Panel, Query, Row, Variable

TAG = "m3serve"
_DATASOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
_LAST = "lastNotNull"

_PanelBuilder = (
    timeseries_builder.Panel
    | stat_builder.Panel
    | bargauge_builder.Panel
    | table_builder.Panel
    | heatmap_builder.Panel
    | statetimeline_builder.Panel
)


def to_json(spec: Dashboard) -> str:
    """The file that Grafana imports or provisions. The same text for the same description."""
    builder = (
        dashboard_builder.Dashboard(spec.title)
        .uid(spec.uid)
        .description(spec.description)
        .tags([TAG])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .readonly()
        .link(
            dashboard_builder.DashboardLink("m3serve")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(False)
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboard_builder.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for variable in spec.variables:
        builder.with_variable(_variable(variable))
    panel_id = 0
    for row in spec.rows:
        row_builder = dashboard_builder.Row(row.title).id(panel_id := panel_id + 1)
        panels = [_panel(panel, panel_id + number) for number, panel in enumerate(row.panels, start=1)]
        panel_id += len(panels)
        _place(builder, row, row_builder, panels)
    text: str = JSONEncoder(sort_keys=True, indent=2).encode(builder.build())
    return text + "\n"


def _place(
    builder: dashboard_builder.Dashboard,
    row: Row,
    row_builder: dashboard_builder.Row,
    panels: list[_PanelBuilder],
) -> None:
    """A folded row holds its panels; those of an open row stand behind it."""
    if row.collapsed:
        for panel in panels:
            row_builder.with_panel(panel)
        builder.with_row(row_builder.collapsed(True))
        return
    builder.with_row(row_builder)
    for panel in panels:
        builder.with_panel(panel)


def _variable(variable: Variable) -> dashboard_builder.QueryVariable:
    order = dashboard.VariableSort.ALPHABETICAL_ASC
    if variable.name == "engine":
        order = dashboard.VariableSort.NUMERICAL_ASC
    return (
        dashboard_builder.QueryVariable(variable.name)
        .label(variable.label)
        .datasource(_DATASOURCE)
        .query({"qryType": 1, "query": variable.query, "refId": variable.name})
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(order)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(dashboard.VariableOption(selected=True, text="All", value="$__all"))
    )


def _panel(panel: Panel, panel_id: int) -> _PanelBuilder:
    builder = _BUILDERS[panel.kind](panel)
    (
        builder.id(panel_id)
        .title(panel.title)
        .description(panel.description)
        .datasource(_DATASOURCE)
        .height(panel.height)
        .span(panel.width)
        .unit(panel.unit)
        .thresholds(_thresholds(panel))
        .targets([_target(panel.kind, query, ref) for query, ref in zip(panel.queries, ascii_uppercase, strict=False)])
    )
    if panel.maximum is not None:
        builder.min(0).max(panel.maximum)
    if panel.decimals is not None:
        builder.decimals(panel.decimals)
    return builder


def _target(kind: Kind, query: Query, ref_id: str) -> prometheus_builder.Dataquery:
    builder = (
        prometheus_builder.Dataquery()
        .ref_id(ref_id)
        .expr(query.expr)
        .legend_format(query.legend or "__auto")
        .editor_mode(prometheus.QueryEditorMode.CODE)
    )
    if kind is Kind.TABLE:
        return builder.instant().format(prometheus.PromQueryFormat.TABLE)
    if RANGE in query.expr:
        # Once, not for every point of the range.
        return builder.instant().format(prometheus.PromQueryFormat.TIME_SERIES)
    if kind is Kind.BUCKETS:
        return builder.range().format(prometheus.PromQueryFormat.HEATMAP)
    return builder.range().format(prometheus.PromQueryFormat.TIME_SERIES)


def _thresholds(panel: Panel) -> dashboard_builder.ThresholdsConfig:
    steps = [dashboard.Threshold(value=None, color=panel.base_color)]
    steps += [dashboard.Threshold(value=value, color=color) for value, color in panel.thresholds]
    return dashboard_builder.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps)


def _color(mode: dashboard.FieldColorModeId) -> dashboard_builder.FieldColor:
    return dashboard_builder.FieldColor().mode(mode)


def _last() -> common_builder.ReduceDataOptions:
    return common_builder.ReduceDataOptions().calcs([_LAST]).values(False).fields("")


def _time_series(panel: Panel) -> timeseries_builder.Panel:
    single_reading = len(panel.queries) == 1 and not panel.queries[0].legend
    builder = (
        timeseries_builder.Panel()
        .line_width(1)
        .fill_opacity(10)
        .show_points(common.VisibilityMode.AUTO)
        .axis_soft_min(0)
        .color_scheme(_color(dashboard.FieldColorModeId.PALETTE_CLASSIC))
        .tooltip(common_builder.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
        .legend(
            common_builder.VizLegendOptions()
            .show_legend(not single_reading)
            .display_mode(common.LegendDisplayMode.TABLE)
            .placement(common.LegendPlacement.BOTTOM)
            .calcs(["mean", "max", _LAST])
        )
    )
    if panel.thresholds:
        builder.thresholds_style(
            common_builder.GraphThresholdsStyleConfig().mode(common.GraphTresholdsStyleMode.DASHED)
        )
    if panel.kind is Kind.STACKED:
        builder.fill_opacity(40).stacking(common_builder.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    return builder


def _stat(panel: Panel) -> stat_builder.Panel:
    is_text = panel.kind is Kind.TEXT
    has_history = not is_text and not any(RANGE in query.expr for query in panel.queries)
    return (
        stat_builder.Panel()
        .reduce_options(_last())
        .color_scheme(_color(dashboard.FieldColorModeId.THRESHOLDS))
        .color_mode(common.BigValueColorMode.NONE if is_text else common.BigValueColorMode.VALUE)
        .graph_mode(common.BigValueGraphMode.AREA if has_history else common.BigValueGraphMode.NONE)
        .text_mode(common.BigValueTextMode.NAME if is_text else common.BigValueTextMode.AUTO)
        .justify_mode(common.BigValueJustifyMode.AUTO)
        .orientation(common.VizOrientation.AUTO)
    )


def _bars(panel: Panel) -> bargauge_builder.Panel:
    mode = dashboard.FieldColorModeId.THRESHOLDS if panel.thresholds else dashboard.FieldColorModeId.CONTINUOUS_BL_YL_RD
    return (
        bargauge_builder.Panel()
        .reduce_options(_last())
        .color_scheme(_color(mode))
        .display_mode(common.BarGaugeDisplayMode.BASIC)
        .value_mode(common.BarGaugeValueMode.TEXT)
        .orientation(common.VizOrientation.HORIZONTAL)
        .min_viz_height(10)
        .min(0)
    )


def _table(panel: Panel) -> table_builder.Panel:
    """Several queries make one table, a row per set of labels; `columns` are kept, renamed and ordered."""
    names = dict(panel.columns)
    builder = (
        table_builder.Panel()
        .show_header(True)
        .with_transformation(dashboard.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(
            dashboard.DataTransformerConfig(id_val="filterFieldsByName", options={"include": {"names": list(names)}})
        )
        .with_transformation(
            dashboard.DataTransformerConfig(
                id_val="organize",
                options={
                    "excludeByName": {},
                    "indexByName": {name: index for index, name in enumerate(names)},
                    "renameByName": names,
                },
            )
        )
    )
    for heading, unit in panel.column_units:
        builder.override_by_name(heading, [dashboard.DynamicConfigValue(id_val="unit", value=unit)])
    return builder


def _buckets(panel: Panel) -> heatmap_builder.Panel:
    """A histogram over time: Grafana takes the difference of neighbouring `le`."""
    return _heatmap().y_axis(heatmap_builder.YAxisConfig().unit(panel.unit).axis_placement(common.AxisPlacement.LEFT))


def _rows(panel: Panel) -> heatmap_builder.Panel:
    """One row per series, coloured by its value."""
    return (
        _heatmap()
        .y_axis(heatmap_builder.YAxisConfig().axis_placement(common.AxisPlacement.LEFT).axis_label("layer"))
        .cell_values(heatmap_builder.CellValues().unit(panel.unit))
        .rows_frame(heatmap_builder.RowsHeatmapOptions().layout(common.HeatmapCellLayout.UNKNOWN).value("mean"))
    )


def _heatmap() -> heatmap_builder.Panel:
    return (
        heatmap_builder.Panel()
        .calculate(False)
        .cell_gap(1)
        .show_value(common.VisibilityMode.NEVER)
        .show_legend()
        .show_tooltip()
        .color(
            heatmap_builder.HeatmapColorOptions()
            .mode(heatmap.HeatmapColorMode.SCHEME)
            .scheme("Turbo")
            .scale(heatmap.HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
            .steps(64)
        )
    )


def _states(panel: Panel) -> statetimeline_builder.Panel:
    mapping = {
        str(value): dashboard.ValueMappingResult(text=text, color=color, index=index)
        for index, (value, text, color) in enumerate(panel.states)
    }
    return (
        statetimeline_builder.Panel()
        .mappings([dashboard.ValueMap(options=mapping)])
        .color_scheme(_color(dashboard.FieldColorModeId.THRESHOLDS))
        .show_value(common.VisibilityMode.AUTO)
        .merge_values(True)
        .row_height(0.8)
        .legend(
            common_builder.VizLegendOptions()
            .show_legend(False)
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
        )
    )


_BUILDERS: dict[Kind, Callable[[Panel], _PanelBuilder]] = {
    Kind.TIME_SERIES: _time_series,
    Kind.STACKED: _time_series,
    Kind.STAT: _stat,
    Kind.TEXT: _stat,
    Kind.BARS: _bars,
    Kind.TABLE: _table,
    Kind.BUCKETS: _buckets,
    Kind.ROWS: _rows,
    Kind.STATES: _states,
}
