-- What became of one reward of every decision: a pure function of a set of decisions and a set of observations.
--
-- decisions(row, decision_id, decided_at_ns)
-- rewards(place, attributed_id, name, observed_at_ns, value, version, versions, alone): `place` orders them by time, then event id;
--     `version` of `versions` counts the values that one event id came with, from 0; `alone` is true where a decision has no other
--     observation of that name: most have one, and need no grouping.
-- $least, $high: the range of an observation; $reversible: whether a negative one takes back an earlier one.
--
-- Words that DuckDB, SQLite and Spark share, but for `sum(... order by ...)`: Spark sums unordered, to the last bits.
with judged as (
    select
        d.row,
        r.place,
        r.value,
        r.alone,
        r.observed_at_ns - d.decided_at_ns as delay,
        case
            when r.value < $least or r.value > $high then 2
            when r.observed_at_ns - d.decided_at_ns > $window_ns then 1
            when r.observed_at_ns - d.decided_at_ns < -$tolerance_ns then 1
            when r.versions > 1 and $conflict = 'exclude' then 3
            when r.version > 0 and $conflict = 'first' then 4
            when r.version < r.versions - 1 and $conflict = 'last' then 4
            else 0
        end as judgement,  -- 0 counts, 1 outside the window, 2 out of range, 3 contradicted, 4 outvoted by the rule
        case when r.version = 0 and r.versions > 1 then 1 else 0 end as contradicted
    from rewards as r
    inner join decisions as d on d.decision_id = r.attributed_id
    where r.name = $name
),

summed as (
    select
        row,
        min(case when judgement = 0 then place end) as first_place,
        max(case when judgement = 0 then place end) as last_place,
        min(case when judgement = 0 then value end) as least_value,
        max(case when judgement = 0 then value end) as most_value,
        sum(case when judgement = 0 then value end order by place) as total_value,
        min(case when judgement = 0 then delay end) as delay,
        sum(case when judgement = 0 then 1 else 0 end) as events,
        sum(case when judgement = 0 and delay < 0 then 1 else 0 end) as early,
        sum(case when judgement = 1 then 1 else 0 end) as late,
        sum(case when judgement = 2 then 1 else 0 end) as refused,
        sum(contradicted) as conflicts,
        sum(case when judgement = 0 and value < 0 and $reversible then 1 else 0 end) as reversed,
        max(case when judgement = 3 then 1 else 0 end) as in_conflict
    from judged
    where not alone
    group by row
),

outcomes as (
    select
        row,
        case when judgement = 0 then value end as aggregate,
        case when judgement = 0 then delay end as delay,
        case when judgement = 0 then 1 else 0 end as events,
        case when judgement = 0 and delay < 0 then 1 else 0 end as early,
        case when judgement = 1 then 1 else 0 end as late,
        case when judgement = 2 then 1 else 0 end as refused,
        0 as conflicts,
        case when judgement = 0 and value < 0 and $reversible then 1 else 0 end as reversed,
        0 as in_conflict
    from judged
    where alone
    union all
    select
        s.row,
        case
            when $aggregation in ('first', 'last') then p.value
            when $aggregation = 'sum' then s.total_value
            when $aggregation = 'min' then s.least_value
            else s.most_value
        end as aggregate,
        s.delay, s.events, s.early, s.late, s.refused, s.conflicts, s.reversed, s.in_conflict
    from summed as s
    left join rewards as p on p.place = case when $aggregation = 'first' then s.first_place else s.last_place end
)

select
    d.row,
    case
        when d.decided_at_ns + $window_ns > $cutoff_ns then null
        when o.in_conflict = 1 then null
        when o.events > 0 then o.aggregate
        else $fallback
    end as value,
    case
        when d.decided_at_ns + $window_ns > $cutoff_ns then 'pending'
        when o.in_conflict = 1 then 'conflict'
        when o.events > 0 then 'observed'
        when $fallback is null then 'unknown'
        else 'default'
    end as state,
    o.delay,
    coalesce(o.events, 0) as events,
    coalesce(o.early, 0) as early,
    coalesce(o.late, 0) as late,
    coalesce(o.refused, 0) as refused,
    coalesce(o.conflicts, 0) as conflicts,
    coalesce(o.reversed, 0) as reversed
from decisions as d
left join outcomes as o on o.row = d.row
