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
        d.decided_at_ns,
        r.place,
        r.value,
        coalesce(r.alone, true) as alone,
        r.observed_at_ns - d.decided_at_ns as delay,
        case
            when r.place is null then null
            when r.value < $least or r.value > $high then 2
            when r.observed_at_ns - d.decided_at_ns > $window_ns then 1
            when r.observed_at_ns - d.decided_at_ns < -$tolerance_ns then 1
            when r.versions > 1 and $conflict = 'exclude' then 3
            when r.version > 0 and $conflict = 'first' then 4
            when r.version < r.versions - 1 and $conflict = 'last' then 4
            else 0
        end as judgement,  -- null: no observation; 0 counts, 1 outside the window, 2 out of range, 3 contradicted, 4 outvoted by the rule
        case when r.version = 0 and r.versions > 1 then 1 else 0 end as contradicted
    from decisions as d
    left join rewards as r on r.attributed_id = d.decision_id and r.name = $name
),

summed as (
    select
        row,
        decided_at_ns,
        min(case when judgement = 0 then place end) as first_place,
        max(case when judgement = 0 then place end) as last_place,
        min(case when judgement = 0 then value end) as least_value,
        max(case when judgement = 0 then value end) as most_value,
        sum(case when judgement = 0 then value end order by place) as total_value,
        min(case when judgement = 0 then delay end) as delay,
        cast(sum(case when judgement = 0 then 1 else 0 end) as integer) as events,
        cast(sum(case when judgement = 0 and delay < 0 then 1 else 0 end) as integer) as early,
        cast(sum(case when judgement = 1 then 1 else 0 end) as integer) as late,
        cast(sum(case when judgement = 2 then 1 else 0 end) as integer) as refused,
        cast(sum(contradicted) as integer) as conflicts,
        cast(sum(case when judgement = 0 and value < 0 and $reversible then 1 else 0 end) as integer) as reversed,
        max(case when judgement = 3 then 1 else 0 end) as in_conflict
    from judged
    where not alone
    group by row, decided_at_ns
),

outcomes as (
    select
        row,
        decided_at_ns,
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
        s.decided_at_ns,
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
    row,
    case
        when decided_at_ns + $window_ns > $cutoff_ns then null
        when in_conflict = 1 then null
        when events > 0 then aggregate
        else $fallback
    end as value,
    case
        when decided_at_ns + $window_ns > $cutoff_ns then 'pending'
        when in_conflict = 1 then 'conflict'
        when events > 0 then 'observed'
        when $fallback is null then 'unknown'
        else 'default'
    end as state,
    delay,
    events,
    early,
    late,
    refused,
    conflicts,
    reversed
from outcomes
